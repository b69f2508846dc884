//! What a communicator has done, is doing and consists of, as Python's tuples.

/// A peer's bytes sent and received.
type Peer = (u64, u64);
/// A transport's name, and its counters by name.
type Link = (&'static str, Vec<(&'static str, u64)>);
/// A call in words, how far it is, of how many steps, and the bytes that it has moved.
type Running = (String, u32, u32, u64);
/// In the order of `unisum.Stats`.
pub(crate) type Stats = (u64, u64, f64, Vec<Peer>, Vec<Link>, Option<Running>);

/// A node, a process, addresses.
type Rank = (usize, u32, Vec<String>);
/// What was measured, by whom, the latency, and the rates in memory and in cache.
type Cost = (String, String, f64, Option<f64>, Option<f64>);
/// Above which size, up to which, the algorithm's name, seconds.
type Range = (usize, usize, &'static str, Option<f64>);
/// In the order of `unisum.Description`.
pub(crate) type Description = (
    String,
    String,
    String,
    Option<f64>,
    Vec<Rank>,
    Option<String>,
    Vec<String>,
    Vec<Cost>,
    Vec<String>,
    Vec<Range>,
    String,
);

pub(crate) fn stats(stats: unisum::Stats) -> Stats {
    let peers = stats.peers.iter().map(|peer| (peer.sent, peer.received)).collect();
    let links = stats.links.into_iter().map(|link| (link.transport, link.counters)).collect();
    let running = stats.running.map(|it| (it.call, it.step, it.steps, it.bytes));
    (stats.calls, stats.sleeps, stats.slept.as_secs_f64(), peers, links, running)
}

pub(crate) fn description(it: unisum::Description) -> Description {
    let (summary, text) = (it.summary(), it.to_string());
    let ranks = it.ranks.into_iter().map(|rank| (rank.node, rank.pid, rank.addresses)).collect();
    let cost = |cost: unisum::MeasuredCost| {
        let rates = cost.rates;
        let in_cache = rates.bytes_per_second_in_cache;
        (cost.what, cost.source, rates.latency_s, rates.bytes_per_second, in_cache)
    };
    let costs = it.costs.into_iter().map(cost).collect();
    let range =
        |range: &unisum::AlgorithmRange| (range.above, range.up_to, range.algorithm, range.seconds);
    let algorithms = it.algorithms.iter().map(range).collect();
    let joined_in = it.joined_in.map(|time| time.as_secs_f64());
    (
        summary,
        it.origin,
        it.transport,
        joined_in,
        ranks,
        it.protection,
        it.links,
        costs,
        it.notes,
        algorithms,
        text,
    )
}
