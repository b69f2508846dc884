//! Copies.

use unisum_kernels::cuda::{COPIES_MAX, CopiesTask, CopyTask};

use super::device::{Grid, Host};

/// Bytes that tell where they come from.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8 + 1).collect()
}

fn check_one(device: &Host, grid: Grid, [to_offset, from_offset]: [usize; 2], bytes: usize) {
    let from = pattern(bytes + 32);
    let mut to = vec![0; bytes + 64];
    // From a multiple of 16 on.
    let from_offset = from.as_ptr().align_offset(16) + from_offset;
    let to_offset = to.as_ptr().align_offset(16) + to_offset;
    let task = CopyTask {
        to: to[to_offset..].as_mut_ptr() as u64,
        from: from[from_offset..].as_ptr() as u64,
        bytes: bytes as u64,
    };
    // SAFETY: both vectors are longer, and nobody else knows them.
    unsafe { device.launch("unisum_copy", grid, &task) };
    assert_eq!(to[to_offset..to_offset + bytes], from[from_offset..from_offset + bytes]);
    let around = to[..to_offset].iter().chain(&to[to_offset + bytes..]);
    assert!(around.into_iter().all(|&byte| byte == 0), "{bytes} bytes: wrote outside");
}

#[test]
fn a_kernel_copies_every_byte_and_no_other() {
    let Some(device) = Host::get() else { return };
    for bytes in (0..70).chain([255, 1000]) {
        for offsets in [[0, 0], [3, 3], [15, 15], [4, 8], [1, 5], [0, 1], [2, 1], [13, 6]] {
            check_one(device, Grid(1, 1 + bytes as u32 % 40), offsets, bytes);
            check_one(device, Grid(3, 5), offsets, bytes);
        }
    }
}

#[test]
fn many_copies_run_in_one_launch() {
    let Some(device) = Host::get() else { return };
    let from = pattern(4200);
    for count in [0, 1, 7, COPIES_MAX] {
        let mut to = vec![0_u8; 4096];
        let mut expected = to.clone();
        let nothing = CopyTask { to: 0, from: 0, bytes: u64::MAX };
        let mut task = CopiesTask { copy: [nothing; COPIES_MAX], count: count as u32 };
        for (i, copy) in task.copy[..count].iter_mut().enumerate() {
            let (target, source, bytes) = (i * 128 + i % 5, 4000 - i * 120, 100 + i % 20);
            expected[target..target + bytes].copy_from_slice(&from[source..source + bytes]);
            *copy = CopyTask {
                to: to[target..].as_mut_ptr() as u64,
                from: from[source..].as_ptr() as u64,
                bytes: bytes as u64,
            };
        }
        // SAFETY: all ranges are within the two vectors, and those written to are apart.
        unsafe { device.launch("unisum_copies", Grid(2, 33), &task) };
        assert_eq!(to, expected);
    }
}
