//! Collectives with all that they may be given, and what the hosts make of the same.

use std::ops::Range;
use std::ptr::NonNull;

use unisum::{
    Collective, Communicator, DeviceBuffer, DeviceCommunicator, DeviceStream, Dtype, RawBuffers,
    RawDeviceBuffers, ReduceOp, Reduction,
};

use super::driver::{Pool, Pooled, is_whole};
use super::support::setting;

/// In the panic of a rank whose result has other bits than the hosts'.
pub const DIFFERS: &str = "the device's result differs";

/// One call.
#[derive(Clone, Debug)]
pub struct Case {
    kind: Kind,
    root: usize,
    algorithm: &'static str,
    dtype: Dtype,
    op: ReduceOp,
    factor: Option<f64>,
    /// Elements of a block, or of everything.
    count: usize,
    in_place: bool,
    /// Whether input and output are of a pool.
    pooled: (bool, bool),
    /// Elements before the first one that is used.
    shift: usize,
    seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    AllReduce,
    Reduce,
    Broadcast,
    AllGather,
    ReduceScatter,
    AllToAll,
    Gather,
    Scatter,
}

const KINDS: [Kind; 8] = [
    Kind::AllReduce,
    Kind::Reduce,
    Kind::Broadcast,
    Kind::AllGather,
    Kind::ReduceScatter,
    Kind::AllToAll,
    Kind::Gather,
    Kind::Scatter,
];

impl Kind {
    const fn reduces(self) -> bool {
        matches!(self, Self::AllReduce | Self::Reduce | Self::ReduceScatter)
    }

    fn collective(self, how: Reduction, root: usize) -> Collective {
        match self {
            Self::AllReduce => Collective::all_reduce(how),
            Self::Reduce => Collective::reduce(how, root),
            Self::Broadcast => Collective::broadcast(root),
            Self::AllGather => Collective::all_gather(),
            Self::ReduceScatter => Collective::reduce_scatter(how),
            Self::AllToAll => Collective::all_to_all(),
            Self::Gather => Collective::gather(root),
            Self::Scatter => Collective::scatter(root),
        }
    }

    /// The blocks that a rank puts in and gets.
    fn blocks(self, world: usize, is_root: bool) -> (usize, usize) {
        let at_root = |blocks| if is_root { blocks } else { 0 };
        match self {
            Self::AllReduce => (1, 1),
            Self::Reduce => (1, at_root(1)),
            Self::Broadcast => (at_root(1), 1),
            Self::AllGather => (1, world),
            Self::ReduceScatter => (world, 1),
            Self::AllToAll => (world, world),
            Self::Gather => (1, at_root(world)),
            Self::Scatter => (at_root(world), 1),
        }
    }
}

/// The cases of this run: those that `SEED` draws, or all.
pub fn drawn(world: usize) -> Vec<Case> {
    let few: usize = setting("FEW").parse().unwrap();
    let mut random = Drawn(setting("SEED").parse().unwrap());
    if !is_whole() {
        return (0..few).map(|_| random.case(world)).collect();
    }
    let mut all = Vec::new();
    for (kind, root) in KINDS.into_iter().flat_map(|kind| [(kind, 0), (kind, world - 1)]) {
        for algorithm in kind.collective(ReduceOp::Sum.into(), root).algorithms() {
            for (op, dtype) in ReduceOp::ALL.iter().flat_map(|&op| Dtype::ALL.map(|it| (op, it))) {
                let is_one = kind.reduces() || op == ReduceOp::Sum;
                if !op.is_defined_for(dtype) || !is_one || rounds_less(algorithm, op, dtype) {
                    continue;
                }
                for in_place in [true, false] {
                    let drawn = random.case(world);
                    let case = Case { kind, root, algorithm, dtype, op, in_place, ..drawn };
                    all.push(Case { factor: None, ..case });
                }
            }
        }
    }
    all
}

/// Averages of short floats by several folds are divided before the last rounding on devices, and
/// after it on hosts.
fn rounds_less(algorithm: &str, op: ReduceOp, dtype: Dtype) -> bool {
    let folds_once = ["one-shot", "two-shot", "direct"].contains(&algorithm);
    let is_short = dtype.is_float() && dtype.bytes() < 4;
    op == ReduceOp::Average && is_short && !folds_once
}

/// A generator: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
struct Drawn(u64);

impl Drawn {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.word() % bound as u64) as usize
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    fn case(&mut self, world: usize) -> Case {
        let (kind, root) = (self.of(&KINDS), self.below(world));
        let algorithm = self.of(&kind.collective(ReduceOp::Sum.into(), root).algorithms());
        let (op, dtype) = loop {
            let (op, dtype) = (self.of(&ReduceOp::ALL), self.of(&Dtype::ALL));
            if op.is_defined_for(dtype) && !rounds_less(algorithm, op, dtype) {
                break (op, dtype);
            }
        };
        let scales = op == ReduceOp::Sum && dtype == Dtype::F32 && self.below(2) == 0;
        let bounds = [1, 3, 20, 300, 300, 5000, 5000, 40_000];
        let bound = self.of(&bounds);
        Case {
            kind,
            root,
            algorithm,
            dtype,
            op,
            factor: scales.then_some(0.375),
            count: self.below(bound + 1),
            in_place: self.below(2) == 0,
            pooled: self.of(&[(false, false), (false, false), (true, false), (false, true)]),
            shift: self.of(&[0, 0, 1, 3]),
            seed: self.word(),
        }
    }
}

/// Elements of a type: ordinary ones, of floats with some that are not.
fn elements(dtype: Dtype, count: usize, seed: u64) -> Vec<u8> {
    let mut random = Drawn(seed);
    let mut bytes = Vec::with_capacity(count * dtype.bytes());
    for _ in 0..count {
        let word = random.word();
        let small = ((word >> 8) % 2000) as f32 / 128.0 - 7.0;
        let is_odd = word.is_multiple_of(29);
        match dtype {
            Dtype::Bool => bytes.push((word & 1) as u8),
            Dtype::F32 if !is_odd => bytes.extend(small.to_ne_bytes()),
            Dtype::F64 if !is_odd => bytes.extend(f64::from(small).to_ne_bytes()),
            Dtype::F16 if !is_odd => bytes.extend(half::f16::from_f32(small).to_ne_bytes()),
            Dtype::Bf16 if !is_odd => bytes.extend(half::bf16::from_f32(small).to_ne_bytes()),
            _ => bytes.extend(&word.rotate_right(8).to_ne_bytes()[..dtype.bytes()]),
        }
    }
    bytes
}

/// Memory of the host that is aligned to any element.
pub struct Host(Vec<u128>, usize);

impl Host {
    pub fn new(bytes: &[u8]) -> Self {
        let mut host = Self(vec![0; bytes.len().div_ceil(16) + 1], bytes.len());
        host.bytes().copy_from_slice(bytes);
        host
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the words are there, and any bytes are bytes.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.1) }
    }

    pub fn start(&mut self) -> NonNull<u8> {
        NonNull::from(&mut self.0[..]).cast()
    }
}

/// Memory of the device.
enum Memory<'a> {
    Own(DeviceBuffer<u8>),
    Pooled(Pooled<'a>),
}

impl<'a> Memory<'a> {
    fn new(device: &DeviceCommunicator, pool: &'a Pool, pooled: bool, bytes: usize) -> Self {
        match pooled {
            true => Self::Pooled(pool.allocate(bytes)),
            false => Self::Own(device.allocate(bytes).unwrap()),
        }
    }

    fn address(&self) -> u64 {
        match self {
            Self::Own(buffer) => buffer.address(),
            Self::Pooled(pooled) => pooled.address,
        }
    }

    fn write(&mut self, bytes: &[u8], stream: &DeviceStream) {
        match self {
            Self::Own(buffer) => buffer.write(0, bytes, stream).unwrap(),
            Self::Pooled(pooled) => pooled.write(bytes, stream),
        }
    }

    fn read(&self, bytes: usize, stream: &DeviceStream) -> Vec<u8> {
        let mut read = vec![0; bytes];
        match self {
            Self::Own(buffer) => buffer.read(0, &mut read, stream).unwrap(),
            Self::Pooled(pooled) => pooled.read(&mut read, stream),
        }
        read
    }
}

impl Case {
    fn reduction(&self) -> Reduction {
        let plain = self.factor.map_or_else(|| self.op.into(), Reduction::sum_scaled_by);
        if self.seed.is_multiple_of(2) { plain.detect_nonfinite() } else { plain }
    }

    /// What the host has found is what the device finds.
    fn compare_found(&self, found: bool, device: &DeviceCommunicator, stream: &DeviceStream) {
        let on_device = device.take_nonfinite(stream, None).unwrap();
        assert_eq!(on_device, found, "whether it is infinite or NaN: {self:?}");
        assert!(!device.take_nonfinite(stream, None).unwrap(), "it was asked already: {self:?}");
    }

    /// Runs it on the host and on the device, and compares; whether the algorithm supports the
    /// world.
    pub fn check(
        &self,
        host: &Communicator,
        device: &DeviceCommunicator,
        stream: &DeviceStream,
        pool: &Pool,
    ) -> bool {
        let collective = self.kind.collective(self.reduction(), self.root);
        host.set_algorithm(Some(self.algorithm)).unwrap();
        let longest = self.count * host.world();
        // What does not support the world both replace, by different ones.
        if host.choice::<u8>(&collective, longest) != self.algorithm {
            return false;
        }
        device.set_algorithm(Some(self.algorithm)).unwrap();
        match self.in_place {
            true => self.in_place(&collective, host, device, stream, pool),
            false => self.apart(&collective, host, device, stream, pool),
        }
        true
    }

    fn in_place(
        &self,
        collective: &Collective,
        host: &Communicator,
        device: &DeviceCommunicator,
        stream: &DeviceStream,
        pool: &Pool,
    ) {
        let (rank, world) = (host.rank(), host.world());
        let (puts, gets) = self.kind.blocks(world, rank == self.root);
        let (count, each) = (self.count, self.dtype.bytes());
        let length = puts.max(gets) * count;
        let begin = elements(self.dtype, length, self.seed ^ rank as u64);
        let mut expected = Host::new(&begin);
        // SAFETY: the memory has so many elements, and nobody else uses it.
        let raw = unsafe { RawBuffers::in_place(self.dtype, expected.start(), length) };
        let found = host.run_raw(collective, raw).unwrap().nonfinite;
        let skipped = self.shift * each;
        let mut memory = Memory::new(device, pool, self.pooled.0, begin.len() + skipped);
        memory.write(&[vec![0xa5; skipped], begin].concat(), stream);
        let at = memory.address() + skipped as u64;
        // SAFETY: as above; the collective has ended when the memory is read.
        let raw = unsafe { RawDeviceBuffers::in_place(self.dtype, at, length) };
        device.run_raw(collective, raw, stream).unwrap();
        self.compare_found(found, device, stream);
        let result = memory.read(expected.1 + skipped, stream);
        let got: Range<usize> = match (puts, gets) {
            (_, 0) => 0..length,
            (_, 1) if puts > 1 => rank * count..(rank + 1) * count,
            _ => 0..length,
        };
        let got = got.start * each..got.end * each;
        self.compare(&result[skipped..][got.clone()], &expected.bytes()[got], rank);
        assert_eq!(result[..skipped], vec![0xa5; skipped], "before the buffer: {self:?}");
    }

    fn apart(
        &self,
        collective: &Collective,
        host: &Communicator,
        device: &DeviceCommunicator,
        stream: &DeviceStream,
        pool: &Pool,
    ) {
        let (rank, world) = (host.rank(), host.world());
        let blocks = self.kind.blocks(world, rank == self.root);
        let [puts, gets] = [blocks.0, blocks.1].map(|blocks| blocks * self.count);
        let each = self.dtype.bytes();
        let input = elements(self.dtype, puts, self.seed ^ rank as u64);
        let begin = elements(self.dtype, gets, self.seed ^ 0x55);
        let (mut host_input, mut expected) = (Host::new(&input), Host::new(&begin));
        let (dtype, from, to) = (self.dtype, host_input.start(), expected.start());
        // SAFETY: the memories have so many elements, and nobody else uses them.
        let raw = unsafe { RawBuffers::out_of_place(dtype, (from, puts), (to, gets)) };
        let found = host.run_raw(collective, raw).unwrap().nonfinite;
        let skipped = self.shift * each;
        let mut from = Memory::new(device, pool, self.pooled.0, input.len() + skipped);
        from.write(&[vec![0xa5; skipped], input.clone()].concat(), stream);
        let mut to = Memory::new(device, pool, self.pooled.1, begin.len() + each);
        to.write(&[begin, vec![0x5a; each]].concat(), stream);
        let (at, into) = ((from.address() + skipped as u64, puts), (to.address(), gets));
        // SAFETY: as above; the collective has ended when the memory is read.
        let raw = unsafe { RawDeviceBuffers::out_of_place(dtype, at, into) };
        device.run_raw(collective, raw, stream).unwrap();
        self.compare_found(found, device, stream);
        let result = to.read(expected.1 + each, stream);
        self.compare(&result[..expected.1], expected.bytes(), rank);
        assert_eq!(result[expected.1..], vec![0x5a; each], "behind the output: {self:?}");
        let kept = from.read(skipped + input.len(), stream);
        assert_eq!(kept[skipped..], input, "the input: {self:?}");
    }

    fn compare(&self, result: &[u8], expected: &[u8], rank: usize) {
        let each = self.dtype.bytes();
        let elements = result.chunks(each).zip(expected.chunks(each)).enumerate();
        let mut wrong = elements.filter(|(_, (result, expected))| result != expected);
        if let Some((at, (result, expected))) = wrong.next() {
            let others = wrong.count();
            panic!(
                "{DIFFERS} on rank {rank} at element {at} and {others} others: {result:02x?}, not \
                 {expected:02x?}: {self:?}"
            );
        }
    }
}
