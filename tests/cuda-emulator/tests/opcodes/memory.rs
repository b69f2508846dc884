//! Memory of all spaces, atomics, barriers, warps, branches and calls.

use crate::HEADER;
use crate::support::{Gpu, leave, role, run};

/// Runs a kernel with the parameters `from` and `to` on 64 threads; `from` holds 0, 1, 2 and so on
/// in 1024 words. Returns what it has written, where it has not written, all bits are set.
fn run_kernel(gpu: &Gpu, body: &str, blocks: u32, threads: u32) -> Vec<u32> {
    let text = format!("{HEADER}{body}");
    let kernel = gpu.kernel(&text, "k");
    let words: Vec<u32> = (0..1024).collect();
    let from = gpu.upload(&words);
    let to = gpu.upload(&[u32::MAX; 1024]);
    gpu.launch(kernel, blocks, threads, &mut [from.into(), to.into()]);
    let result = gpu.download(to, 1024);
    gpu.free(from);
    gpu.free(to);
    gpu.unload(kernel);
    result
}

/// A kernel that has `%from`, `%to` and the index `%i` of the thread, and `%mine`, the address of
/// its own four words of the result.
fn kernel(declarations: &str, body: &str) -> String {
    format!(
        "{declarations}
        .visible .entry k(.param .u64 p0, .param .u64 p1) {{
            .reg .b64 %from, %to, %mine, %rd<16>;
            .reg .b32 %i, %r<32>;
            .reg .b16 %h<8>;
            .reg .f32 %f<8>;
            .reg .pred %p<8>;
            ld.param.u64 %from, [p0];
            ld.param.u64 %to, [p1];
            mov.u32 %i, %tid.x;
            mul.wide.u32 %rd0, %i, 16;
            add.s64 %mine, %to, %rd0;
            {body}
            ret;
        }}"
    )
}

fn in_process(name: &str, body: fn(&Gpu)) {
    if role().is_none() {
        run(name, &[("LEAKS", "fail")]).assert_success();
        return;
    }
    let gpu = Gpu::open(0);
    body(&gpu);
    gpu.close();
    leave();
}

#[test]
fn loads_and_stores_of_all_widths_and_vectors() {
    in_process("memory::loads_and_stores_of_all_widths_and_vectors", |gpu| {
        let text = kernel(
            "",
            "ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%from+16];
             st.global.v4.u32 [%to], {%r3, %r2, %r1, %r0};
             ld.global.v2.u64 {%rd1, %rd2}, [%from];
             st.global.v2.u64 [%to+16], {%rd2, %rd1};
             st.global.u32 [%to+32], 0xFFFE80FF;
             ld.global.s8 %h0, [%to+33];
             cvt.s32.s16 %r4, %h0;
             ld.global.u8 %h1, [%to+33];
             cvt.u32.u16 %r5, %h1;
             ld.global.s16 %r6, [%to+34];
             ld.global.v2.u16 {%h2, %h3}, [%to+32];
             mov.b32 %r7, {%h3, %h2};
             st.global.v4.b32 [%to+48], {%r4, %r5, %r6, %r7};
             ld.global.v4.u8 {%h0, %h1, %h2, %h3}, [%from+5];
             ld.volatile.global.u32 %r8, [%from+12];
             ld.relaxed.gpu.global.u32 %r9, [%from+20];
             st.release.sys.global.u32 [%to+64], %r8;
             st.global.u32 [%to+68], %r9;",
        );
        let text = text.replace("[%from+5]", "[%from+4]");
        let found = run_kernel(gpu, &text, 1, 1);
        assert_eq!(found[..4], [7, 6, 5, 4]);
        assert_eq!(found[4..8], [2, 3, 0, 1]);
        assert_eq!(found[12..16], [0xFFFF_FF80, 0x80, 0xFFFF_FFFE, 0x80FF_FFFE]);
        assert_eq!(found[16..18], [3, 5]);
    });
}

#[test]
fn constants_variables_locals_and_parameters_have_addresses() {
    in_process("memory::constants_variables_locals_and_parameters_have_addresses", |gpu| {
        let text = kernel(
            ".const .align 4 .b8 table[8] = {1, 0, 0, 0, 255, 1, 0, 0};
             .global .align 4 .u32 counter = 40;
             .global .align 8 .f64 ratio = 0d3FF8000000000000;",
            ".local .align 16 .b8 depot[32];
             .reg .b64 %sp;
             ld.const.u32 %r0, [table+4];
             ld.global.u32 %r1, [counter];
             mov.u64 %rd1, table;
             ld.u32 %r2, [%rd1];
             mov.u64 %rd2, depot;
             cvta.local.u64 %sp, %rd2;
             st.local.u32 [%rd2+8], 77;
             ld.u32 %r3, [%sp+8];
             st.global.v4.u32 [%to], {%r0, %r1, %r2, %r3};
             mov.b64 %rd3, p1;
             ld.param.u64 %rd4, [%rd3];
             ld.global.f64 %rd5, [ratio];
             st.global.u64 [%rd4+16], %rd5;
             isspacep.local %p0, %sp;
             isspacep.global %p1, %to;
             selp.u32 %r4, 1, 0, %p0;
             selp.u32 %r5, 1, 0, %p1;
             st.global.v2.u32 [%to+24], {%r4, %r5};",
        );
        let found = run_kernel(gpu, &text, 1, 1);
        assert_eq!(found[..4], [511, 40, 1, 77]);
        assert_eq!(found[4..8], [0, 0x3FF8_0000, 1, 1]);
    });
}

#[test]
fn atomics_update_and_return_the_old_value() {
    in_process("memory::atomics_update_and_return_the_old_value", |gpu| {
        let text = kernel(
            "",
            "atom.global.add.u32 %r0, [%from+400], 1;
             atom.global.inc.u32 %r1, [%from+404], 3;
             red.global.max.u32 [%from+408], %i;
             atom.global.or.b32 %r2, [%from+412], 0x80000000;
             cvt.rn.f32.u32 %f0, %i;
             atom.global.exch.b32 %r3, [%from+416], 9;
             st.global.v4.u32 [%mine], {%r0, %r1, %r2, %r3};
             setp.ne.u32 %p0, %i, 63;
             @%p0 bra DONE;
             ld.global.u32 %r4, [%from+400];
             ld.global.u32 %r5, [%from+408];
             atom.global.cas.b32 %r6, [%from+420], 105, 7;
             ld.global.u32 %r7, [%from+420];
             st.global.v4.u32 [%to+2048], {%r4, %r5, %r6, %r7};
             atom.global.cas.b64 %rd1, [%from+424], 0, 7;
             st.global.u64 [%to+2064], %rd1;
             atom.global.add.f32 %f1, [%from+432], 0f3F800000;
             atom.global.dec.u32 %r8, [%from+436], 5;
             atom.global.min.s32 %r9, [%from+440], -4;
             ld.global.v2.u32 {%r10, %r11}, [%from+432];
             ld.global.u32 %r12, [%from+440];
             st.global.v2.u32 [%to+2072], {%r11, %r12};
             DONE:",
        );
        let found = run_kernel(gpu, &text, 1, 64);
        let sorted = |lane: usize| {
            let mut values: Vec<u32> =
                found.iter().skip(lane).step_by(4).take(64).copied().collect();
            values.sort_unstable();
            values
        };
        assert_eq!(sorted(0), (100..164).collect::<Vec<_>>());
        // 101 is beyond the limit: 0 follows, then 1, 2, 3, 0 and so on.
        assert_eq!(sorted(1).iter().filter(|value| **value == 0).count(), 16);
        assert_eq!(sorted(2)[0], 103);
        assert_eq!(sorted(3), [vec![9; 63], vec![104]].concat());
        assert_eq!(found[512..516], [164, 102, 105, 7]);
        assert_eq!(found[516..518], [106, 107]);
        assert_eq!(found[518..520], [5, (-4_i32).cast_unsigned()]);
    });
}

#[test]
fn barriers_make_shared_memory_visible() {
    in_process("memory::barriers_make_shared_memory_visible", |gpu| {
        let text = kernel(
            ".shared .align 4 .b8 cells[256];",
            "mov.u64 %rd1, cells;
             mul.wide.u32 %rd2, %i, 4;
             add.s64 %rd3, %rd1, %rd2;
             st.shared.u32 [%rd3], %i;
             bar.sync 0;
             xor.b32 %r0, %i, 63;
             mul.wide.u32 %rd4, %r0, 4;
             cvta.shared.u64 %rd5, %rd1;
             add.s64 %rd6, %rd5, %rd4;
             ld.u32 %r1, [%rd6];
             setp.eq.u32 %p0, %i, 5;
             barrier.sync 1;
             bar.red.or.pred %p1, 0, %p0;
             bar.red.and.pred %p2, 0, %p0;
             bar.red.popc.u32 %r2, 0, %p0;
             selp.u32 %r3, 1, 0, %p1;
             selp.u32 %r4, 1, 0, %p2;
             st.global.v4.u32 [%mine], {%r1, %r3, %r4, %r2};",
        );
        let found = run_kernel(gpu, &text, 1, 64);
        for (thread, words) in (0..64).zip(found.chunks(4)) {
            assert_eq!(words, [63 - thread, 1, 0, 1]);
        }
    });
}

#[test]
fn lanes_of_a_warp_exchange_values() {
    in_process("memory::lanes_of_a_warp_exchange_values", |gpu| {
        let text = kernel(
            "",
            "shfl.sync.bfly.b32 %r0|%p0, %i, 1, 31, -1;
             shfl.sync.up.b32 %r1|%p1, %i, 2, 0, -1;
             shfl.sync.down.b32 %r2|%p2, %i, 3, 31, -1;
             shfl.sync.idx.b32 %r3|%p3, %i, 5, 31, -1;
             st.global.v4.u32 [%mine], {%r0, %r1, %r2, %r3};
             and.b32 %r4, %i, 1;
             setp.eq.u32 %p4, %r4, 1;
             vote.sync.ballot.b32 %r5, %p4, -1;
             vote.sync.any.pred %p5, %p4, -1;
             vote.sync.all.pred %p6, %p4, -1;
             selp.u32 %r6, 1, 0, %p5;
             selp.u32 %r7, 1, 0, %p6;
             selp.u32 %r8, 1, 0, %p1;
             bar.warp.sync -1;
             st.global.v4.u32 [%mine+1024], {%r5, %r6, %r7, %r8};",
        );
        let found = run_kernel(gpu, &text, 1, 64);
        for thread in 0..64_u32 {
            let at = thread as usize * 4;
            let (lane, first) = (thread % 32, thread / 32 * 32);
            let up = if lane >= 2 { thread - 2 } else { thread };
            let down = if lane + 3 < 32 { thread + 3 } else { thread };
            assert_eq!(found[at..at + 4], [thread ^ 1, up, down, first + 5]);
            assert_eq!(found[at + 256..at + 260], [0xAAAA_AAAA, 1, 0, u32::from(lane >= 2)]);
        }
    });
}

#[test]
fn branches_calls_and_tables_go_where_they_say() {
    in_process("memory::branches_calls_and_tables_go_where_they_say", |gpu| {
        let functions = "
            .func (.param .b32 result) sum(.param .b32 a, .param .b32 b) {
                .reg .b32 %r<8>;
                .reg .pred %p;
                .param .b32 inner;
                ld.param.u32 %r0, [a];
                ld.param.u32 %r1, [b];
                setp.eq.u32 %p, %r1, 0;
                @%p bra END;
                add.u32 %r0, %r0, %r1;
                sub.u32 %r1, %r1, 1;
                {
                    .param .b32 x;
                    .param .b32 y;
                    .param .b32 z;
                    st.param.b32 [x], %r0;
                    st.param.b32 [y], %r1;
                    call (z), sum, (x, y);
                    ld.param.b32 %r0, [z];
                }
                END:
                st.param.b32 [result], %r0;
                ret;
            }
            .func (.param .b32 result) twice(.param .b32 a, .param .b32 b) {
                .reg .b32 %r<2>;
                ld.param.u32 %r0, [a];
                shl.b32 %r1, %r0, 1;
                st.param.b32 [result+0], %r1;
                ret;
            }";
        let text = kernel(
            functions,
            "mov.u64 %rd1, sum;
             mov.u64 %rd2, twice;
             and.b32 %r0, %i, 1;
             setp.eq.u32 %p0, %r0, 0;
             selp.b64 %rd3, %rd1, %rd2, %p0;
             {
                .param .b32 x; .param .b32 y; .param .b32 z;
                st.param.b32 [x+0], %i;
                st.param.b32 [y+0], 4;
                proto : .callprototype (.param .b32 _) _ (.param .b32 _, .param .b32 _);
                call (z), %rd3, (x, y), proto;
                ld.param.b32 %r1, [z+0];
             }
             rem.u32 %r2, %i, 3;
             table: .branchtargets ZERO, ONE, TWO;
             brx.idx %r2, table;
             ZERO: mov.u32 %r3, 100; bra.uni OUT;
             ONE: mov.u32 %r3, 101; bra.uni OUT;
             TWO: mov.u32 %r3, 102;
             OUT:
             @!%p0 add.u32 %r3, %r3, 1000;
             st.global.v2.u32 [%mine], {%r1, %r3};",
        );
        let found = run_kernel(gpu, &text, 1, 64);
        for thread in 0..64_u32 {
            let at = thread as usize * 4;
            let is_even = thread.is_multiple_of(2);
            let called = if is_even { thread + 10 } else { 2 * thread };
            let jumped = 100 + thread % 3 + if is_even { 0 } else { 1000 };
            assert_eq!(found[at..at + 2], [called, jumped], "thread {thread}");
        }
    });
}

#[test]
fn registers_are_packed_and_unpacked() {
    in_process("memory::registers_are_packed_and_unpacked", |gpu| {
        let text = kernel(
            "",
            "mov.u32 %r0, 0x11223344;
             mov.b32 {%h0, %h1}, %r0;
             mov.b32 %r1, {%h1, %h0};
             mov.b64 %rd1, {%r0, %r1};
             mov.b64 {%r1, %r0}, %rd1;
             mov.b64 {_, %r2}, %rd1;
             { .reg .b16 %h0; mov.b16 %h0, 9; cvt.u32.u16 %r3, %h0; }
             cvt.u32.u16 %r4, %h0;
             st.global.v4.u32 [%to], {%r0, %r1, %r2, %r3};
             st.global.u32 [%to+16], %r4;
             add.cc.u32 %r5, %r0, %r0;
             sub.cc.u32 %r6, 0, 1;
             subc.u32 %r7, 5, 0;
             add.cc.u32 %r8, -1, 1;
             addc.u32 %r9, 5, 0;
             st.global.v2.u32 [%to+20], {%r7, %r9};",
        );
        // 8 bytes have to be aligned.
        let text = text.replace("[%to+20]", "[%to+24]");
        let found = run_kernel(gpu, &text, 1, 1);
        assert_eq!(found[..5], [0x3344_1122, 0x1122_3344, 0x3344_1122, 9, 0x3344]);
        assert_eq!(found[6..8], [4, 6]);
    });
}
