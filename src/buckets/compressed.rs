//! Buckets that travel in fewer bytes: encoded, but summed in `f32`.

use unisum_link::kernels::Encoding;
use unisum_link::{Dtype, Rank};

use super::codec::Kept;
use super::codec::feedback::{ErrorFeedback, Piece};
use super::hook::{AllReduce, Bucket, Hook};
use super::rooms::Rooms;
use crate::{Buffer, Buffers, Collective, Error};

/// Averages buckets of `f32` that travel encoded ([`Encoding`]). Sums are made in `f32`: each rank
/// gets its share of all ranks' encoded gradients (an all-to-all), adds them in rank order, and
/// gives everybody the encoded average (an all-gather). So 2·(n − 1)/n of the encoded bytes travel,
/// as in a ring all-reduce, and each value is rounded twice, however many ranks there are.
///
/// What both roundings lost is added to the next step's gradients, unless that is switched off.
/// Buckets of other types are averaged as they are. Memory: 16 bytes for each element, and twice
/// its encoding.
///
/// Source of the exchange: Dettmers, "8-bit approximations for parallelism in deep learning", ICLR
/// 2016; of the feedback: see [`Compressed::without_feedback`].
#[derive(Debug)]
pub struct Compressed {
    encoding: Encoding,
    has_feedback: bool,
    rooms: Rooms<Room>,
    /// What was lost, of buckets that have no room yet.
    kept: Kept,
}

/// What a bucket's exchange needs.
#[derive(Debug)]
struct Room {
    /// The whole bucket, encoded: first this rank's, then the average.
    wire: Buffer<u8>,
    /// This rank's share as the others sent it.
    shares: Buffer<u8>,
    sum: Vec<f32>,
    feedback: Option<[ErrorFeedback; 2]>,
    all_to_all: Collective,
    all_gather: Collective,
    share: Share,
}

/// What a rank sums of a bucket.
#[derive(Clone, Copy, Debug)]
struct Share {
    /// Elements.
    start: usize,
    count: usize,
    /// Encoded.
    byte: usize,
    bytes: usize,
}

impl Compressed {
    /// By an encoding, with error feedback.
    pub fn new(encoding: Encoding) -> Self {
        Self { encoding, has_feedback: true, rooms: Rooms::new(), kept: Kept::default() }
    }

    /// Forgets what rounding lost. Error feedback (Seide et al., Interspeech 2014; Karimireddy et
    /// al., ICML 2019, arXiv:1901.09847) is what makes 8 bits train as well as 32.
    #[must_use]
    pub fn without_feedback(self) -> Self {
        Self { has_feedback: false, ..self }
    }

    fn room(&mut self, bucket: &Bucket<'_>) -> Result<&mut Room, Error> {
        if self.rooms.are_stale(bucket) {
            self.kept = self.kept();
            self.rooms.move_to(bucket);
        }
        self.rooms.of(bucket, || {
            let mut room = Room::new(self.encoding, self.has_feedback, bucket)?;
            room.feedback.iter_mut().flatten().for_each(|lost| lost.recall(&self.kept));
            Ok(room)
        })
    }

    fn kept(&self) -> Kept {
        let mut kept = self.kept.clone();
        self.feedback().for_each(|lost| lost.keep(&mut kept));
        kept
    }

    fn feedback(&self) -> impl Iterator<Item = &ErrorFeedback> {
        self.rooms.iter().flat_map(|room| room.feedback.iter().flatten())
    }

    fn feedback_mut(&mut self) -> impl Iterator<Item = &mut ErrorFeedback> {
        self.rooms.iter_mut().flat_map(|room| room.feedback.iter_mut().flatten())
    }
}

impl Hook for Compressed {
    fn name(&self) -> String {
        let with = if self.has_feedback { "with" } else { "without" };
        format!("{:?} on the wire {with} error feedback", self.encoding)
    }

    fn reduce(&mut self, bucket: &mut Bucket<'_>) -> Result<(), Error> {
        if bucket.dtype() != Dtype::F32 {
            return AllReduce.reduce(bucket);
        }
        let encoding = self.encoding;
        let nonfinite = self.room(bucket)?.average(encoding, bucket)?;
        if nonfinite {
            bucket.found_nonfinite();
        }
        Ok(())
    }

    fn settle(&mut self, applied: bool) {
        self.feedback_mut().for_each(|lost| lost.settle(applied));
    }

    fn rescale(&mut self, factor: f32) {
        self.kept.scale(factor);
        self.feedback_mut().for_each(|lost| lost.rescale(factor));
    }

    fn save(&self) -> Vec<u8> {
        self.kept().to_bytes()
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), String> {
        self.kept = Kept::from_bytes(saved).map_err(|error| error.to_string())?;
        self.rooms.clear();
        Ok(())
    }
}

impl Share {
    fn of(rank: Rank, encoding: Encoding, count: usize, world: usize) -> Self {
        let each = count.div_ceil(world).next_multiple_of(encoding.block());
        let bound = |rank: usize| (rank * each).min(count);
        let (start, end) = (bound(rank), bound(rank + 1));
        let (byte, bytes) = (encoding.bytes(start), encoding.bytes(end - start));
        Self { start, count: end - start, byte, bytes }
    }
}

impl Room {
    fn new(encoding: Encoding, has_feedback: bool, bucket: &Bucket<'_>) -> Result<Self, Error> {
        let communicator = bucket.communicator();
        let (rank, world, count) = (communicator.rank(), communicator.world(), bucket.len());
        let share = Share::of(rank, encoding, count, world);
        let bytes_of = |rank| Share::of(rank, encoding, count, world).bytes;
        let bytes: Vec<usize> = (0..world).map(bytes_of).collect();
        let feedback = has_feedback.then(|| {
            let pieces = bucket.parameters().map(|(parameter, elements)| Piece {
                parameter: parameter.name().into(),
                start: 0,
                at: elements.start,
                count: elements.len(),
            });
            let averages = bucket.parameters().filter_map(|(parameter, elements)| {
                let start = elements.start.max(share.start);
                let end = elements.end.min(share.start + share.count);
                (start < end).then(|| Piece {
                    parameter: format!("average of {}", parameter.name()).into(),
                    start: start - elements.start,
                    at: start - share.start,
                    count: end - start,
                })
            });
            let own = ErrorFeedback::new(count, pieces.collect());
            [own, ErrorFeedback::new(share.count, averages.collect())]
        });
        Ok(Self {
            wire: communicator.allocate(encoding.bytes(count))?,
            shares: communicator.allocate(world * share.bytes)?,
            sum: vec![0.0; share.count],
            feedback,
            all_to_all: Collective::all_to_all_v(&bytes, &vec![share.bytes; world]),
            all_gather: Collective::all_gather().with_counts(&bytes),
            share,
        })
    }

    /// Whether the average, or what led to it, is infinite or NaN somewhere: the same on all ranks.
    fn average(&mut self, encoding: Encoding, bucket: &mut Bucket<'_>) -> Result<bool, Error> {
        let (communicator, factor) = (bucket.communicator(), bucket.factor());
        let gradients = bucket.elements::<f32>();
        let encode = |lost: Option<&mut ErrorFeedback>, from: &[f32], to: &mut [u8]| match lost {
            Some(lost) => lost.encode(encoding, from, to),
            None => encoding.encode(from, to),
        };
        let [own, of_average] = match &mut self.feedback {
            Some([own, of_average]) => [Some(own), Some(of_average)],
            None => [None, None],
        };
        encode(own, gradients, &mut self.wire);
        communicator.run(&self.all_to_all, Buffers::Apart(&self.wire, &mut self.shares))?;
        let Share { byte, bytes, .. } = self.share;
        // A rank may have no share at all.
        let shares = self.shares.chunks_exact(bytes.max(1));
        for (rank, share) in shares.enumerate() {
            match rank {
                0 => encoding.decode(share, &mut self.sum),
                _ => encoding.add(share, &mut self.sum),
            };
        }
        self.sum.iter_mut().for_each(|sum| *sum *= factor);
        encode(of_average, &self.sum, &mut self.wire[byte..byte + bytes]);
        communicator.run(&self.all_gather, Buffers::InPlace(&mut self.wire))?;
        Ok(encoding.decode(&self.wire, gradients))
    }
}
