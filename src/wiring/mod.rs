//! Joining: from rank and world to an engine whose links reach everybody.
//!
//! All ranks go through the same exchanges over the control connection: cards (where is who, and
//! with which settings), who shares memory with whom, and what the links were measured to cost.

mod calibrate;
mod card;
mod cores;
mod costs;
mod earlier;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod group;
mod job;
mod meeting;
mod node;
mod pairs;
mod report;
mod tcp;
mod verbs;

use std::sync::Arc;
use std::time::Instant;

use unisum_algorithms::Topology;
use unisum_link::{Link, Rank};

use crate::choice::{self, Choice};
use crate::membership::Membership;
use crate::settings::Settings;
use crate::{Error, ErrorKind};
use calibrate::Limit;
use card::Card;
use cores::Cores;
use costs::Site;
pub(crate) use group::{Group, Member, Parent};
pub(crate) use job::Job;
pub(crate) use meeting::Meeting;
use node::{Circle, Node, Offer};
use unisum_control::launcher::Detected;
use unisum_control::{Control, ControlError, Share, Verdict, VerdictKind};
use unisum_engine::{Engine, Links, Tuning};

/// What joining gave.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) job: Arc<Job>,
    pub(crate) engine: Engine,
    pub(crate) choice: Choice,
    pub(crate) tuning: Tuning,
    pub(crate) transport: String,
    pub(crate) description: String,
}

/// Gives every rank of a communicator what all ranks have for it, in rank order. All ranks call it,
/// equally often, and all with the same for everybody or all with something for each.
pub(crate) type Exchange<'a> = dyn Fn(Share) -> Result<Vec<Vec<u8>>, Error> + 'a;

/// Joins the job. Blocks until every rank has come.
/// What goes wrong on this rank alone is told to the others, which wait for it.
pub(crate) fn join(
    detected: &Detected,
    settings: &Settings,
    meeting: &Meeting,
) -> Result<(Membership, Joined), Error> {
    let (rank, world, start) = (detected.rank, detected.world, Instant::now());
    let control = tcp::start_control(detected, settings, meeting);
    let control = Arc::new(control.inspect_err(|error| meeting.failed(error))?);
    let membership = Membership::of_job(control, rank, world);
    match wire(detected, settings, meeting, &membership, start) {
        Ok(joined) => Ok((membership, joined)),
        Err(error) => {
            meeting.close();
            let error = membership.own_failure(error);
            let is_absent = |verdict: Verdict| verdict.kind == VerdictKind::Absent;
            let are_absent = membership.verdict().is_some_and(is_absent);
            Err(if are_absent { with_hint(error, detected) } else { error })
        }
    }
}

/// The error of ranks that did not find each other, with what may help.
fn with_hint(error: Error, detected: &Detected) -> Error {
    let Some(hint) = detected.hint() else { return error };
    let culprits = error.culprits().to_vec();
    Error::new(error.kind(), format!("{error}\n  {hint}")).caused_by(culprits)
}

/// Makes the links of the job's own communicator.
fn wire(
    detected: &Detected,
    settings: &Settings,
    meeting: &Meeting,
    membership: &Membership,
    start: Instant,
) -> Result<Joined, Error> {
    let (rank, world, control) = (detected.rank, detected.world, membership.control());
    let secret = &meeting.secret;
    let fixed = settings.algorithm.as_deref().map(choice::index_of).transpose()?;
    let offer = Offer::new(settings.transport, secret);
    let cards = exchange_cards(control, rank, settings, &offer)?;
    // All are there, and none goes on without rank 0, which gives them what comes next.
    meeting.close();
    let hosts: Vec<&str> = cards.iter().map(|card| card.host.as_str()).collect();
    let exchange = |share: Share| control.exchange(share).map_err(rendezvous_error);
    let circle = Circle {
        rank,
        hosts: &hosts,
        cards: cards.iter().map(|card| card.shm.clone()).collect(),
        session: control.session(),
        exchange: &exchange,
        membership,
        #[cfg(feature = "shm")]
        heaps: None,
    };
    let Node { members, link, topology } = offer.join(&circle, settings)?;
    #[cfg_attr(not(feature = "verbs"), expect(unused_mut, reason = "only RDMA registers memory"))]
    let mut job = Job::new(settings, secret, detected, &cards, (control, link.as_ref()))?;
    control.set_addresses(job.places.iter().map(|place| place.addresses.clone()).collect());
    let mut links = Assembly::new(world);
    #[cfg_attr(not(feature = "verbs"), expect(unused_mut, reason = "only RDMA has devices"))]
    let mut devices = String::new();
    let others = others(&members, world);
    let asking = verbs::Asking {
        rank,
        others: &others,
        topology: &topology,
        settings,
        membership,
        exchange: &exchange,
        #[cfg(feature = "verbs")]
        registry: None,
    };
    let rdma = if others.is_empty() { None } else { asking.link()? };
    #[cfg(feature = "verbs")]
    if let Some(rdma) = &rdma {
        job.arena.register_with(rdma.registry());
        devices = format!("RDMA: {}\n", rdma.description());
    }
    links.add_all((link, rdma), &members, &job, membership, (rank, control.session()))?;
    let transport = links.names.join("+");
    let mut engine = links.engine(rank, job.ranks_and_cores(&members));
    engine.links().iter().for_each(|link| membership.add_waker(link.waker()));
    let tuning = Tuning { slice_bytes: settings.slice_bytes, window: settings.window };
    // Less than ranks wait that measure nothing: who measures knows more of what is wrong.
    let until = Instant::now() + settings.connect_timeout * 3 / 4;
    let limit = Limit { until, membership };
    let (members, of_job, nodes, by) = (&members[..], &job, &topology, &transport[..]);
    let site = Site { rank, members, job: of_job, topology: nodes, transport: by, tuning, limit };
    let agreed = costs::agree(&mut engine, site)?;
    let seconds = start.elapsed().as_secs_f64();
    let description =
        describe(detected, &cards, &topology, &transport, seconds) + &devices + &agreed.text;
    tracing::info!("rank {rank} of {world} joined over {transport} in {seconds:.3} s");
    let choice = agreed.choice(topology, &mut engine, tuning, fixed);
    Ok(Joined { job: Arc::new(job), engine, choice, tuning, transport, description })
}

/// The ranks that share no memory with this one.
fn others(members: &[Rank], world: usize) -> Vec<Rank> {
    (0..world).filter(|peer| !members.contains(peer)).collect()
}

/// The links of a communicator, while they are put together.
struct Assembly {
    names: Vec<&'static str>,
    links: Links,
}

impl Assembly {
    fn new(world: usize) -> Self {
        let links = Links { all: Vec::new(), route: vec![0; world], group: None };
        Self { names: Vec::new(), links }
    }

    fn add(&mut self, name: &'static str, mut link: Box<dyn Link>, ranks: &[Rank]) {
        let index = self.links.all.len();
        if link.group().is_some() {
            self.links.group = Some(index);
        }
        ranks.iter().for_each(|&rank| self.links.route[rank] = index);
        self.names.push(name);
        self.links.all.push(link);
    }

    /// Adds the node's link, and one to the ranks that share no memory with this one: over RDMA if
    /// there is that, else over TCP.
    fn add_all(
        &mut self,
        (shared, rdma): (Option<node::Shared>, Option<verbs::VerbsLink>),
        members: &[Rank],
        job: &Job,
        membership: &Membership,
        (rank, session): (Rank, [u8; 16]),
    ) -> Result<(), Error> {
        if let Some(shared) = shared {
            self.add("shm", shared.link, members);
        }
        let others = others(members, self.links.route.len());
        match rdma {
            #[cfg(feature = "verbs")]
            Some(rdma) => self.add("verbs", Box::new(rdma), &others),
            #[cfg(not(feature = "verbs"))]
            Some(rdma) => match rdma {},
            None if others.is_empty() => {}
            None => self.add("tcp", tcp::connect(job, membership, (rank, session))?, &others),
        }
        Ok(())
    }

    /// The engine of a rank on whose host so many ranks have so many cores.
    fn engine(self, rank: Rank, (ranks, cores): (usize, usize)) -> Engine {
        Engine::new(rank, self.links, ranks as f64 / cores as f64)
    }
}

fn exchange_cards(
    control: &Control,
    rank: Rank,
    settings: &Settings,
    offer: &Offer,
) -> Result<Vec<Card>, Error> {
    let card = Card {
        addresses: control.addresses().to_vec(),
        host: node::host_name(),
        pid: std::process::id(),
        cores: Cores::own(),
        settings: format!(
            "{} UNISUM_TIMEOUT={}",
            common_settings(settings),
            settings.timeout.as_secs_f64()
        ),
        shm: offer.card(),
    };
    let cards = control.exchange(card.encode()).map_err(rendezvous_error)?;
    let cards: Vec<Card> = cards
        .iter()
        .enumerate()
        .map(|(peer, card)| {
            Card::decode(card).map_err(|why| {
                let text = format!("rank {peer} introduced itself with {why}");
                Error::new(ErrorKind::Rendezvous, text).on(rank).caused_by(vec![peer])
            })
        })
        .collect::<Result<_, _>>()?;
    check_settings(rank, &cards)?;
    Ok(cards)
}

/// The settings that have to be the same on all ranks, as a user would write them, but for the
/// time limit of calls: that changes nothing of what a file says.
fn common_settings(settings: &Settings) -> String {
    let algorithm = settings.algorithm.as_deref().unwrap_or("auto");
    let Settings { transport, slice_bytes, window, sockets_per_peer, .. } = settings;
    let reproducible = u8::from(settings.reproducible);
    // Rank 0's file counts, whatever it is called elsewhere.
    let tuning = if settings.tuning.is_some() { "set" } else { "" };
    format!(
        "UNISUM_TRANSPORT={transport} UNISUM_ALGORITHM={algorithm} \
         UNISUM_SLICE_BYTES={slice_bytes} UNISUM_WINDOW={window} \
         UNISUM_TCP_SOCKETS={sockets_per_peer} UNISUM_REPRODUCIBLE={reproducible} \
         UNISUM_TUNING={tuning}"
    )
}

fn check_settings(rank: Rank, cards: &[Card]) -> Result<(), Error> {
    let first = &cards[0].settings;
    let differs = |card: &Card| card.settings != *first;
    let Some(other) = cards.iter().position(differs) else { return Ok(()) };
    let both = first.split(' ').zip(cards[other].settings.split(' '));
    let (ours, theirs): (Vec<&str>, Vec<&str>) = both.filter(|(a, b)| a != b).unzip();
    let text = format!(
        "settings that must be the same on all ranks differ: rank 0 has {}, rank {other} has {}",
        ours.join(" "),
        theirs.join(" ")
    );
    Err(Error::new(ErrorKind::Configuration, text).on(rank).caused_by(vec![other]))
}

/// A failure while the links were made, as one to join.
fn starting_failed(judged: &Error, doing: &str) -> Error {
    let text = format!("{doing}: {judged}");
    Error::new(ErrorKind::Rendezvous, text).caused_by(judged.culprits().to_vec())
}

fn rendezvous_error(error: ControlError) -> Error {
    Error::new(ErrorKind::Rendezvous, error.to_string()).caused_by(error.culprits())
}

fn describe(
    detected: &Detected,
    cards: &[Card],
    topology: &Topology,
    transport: &str,
    seconds: f64,
) -> String {
    let nodes = topology.node_count();
    let mut text = format!(
        "rank {} of {} (from {}), {nodes} node{}, over {transport}, joined in {seconds:.3} s\n",
        detected.rank,
        detected.world,
        detected.source,
        if nodes == 1 { "" } else { "s" },
    );
    for (rank, card) in cards.iter().enumerate() {
        let addresses: Vec<_> = card.addresses.iter().map(ToString::to_string).collect();
        let address = if addresses.is_empty() { "-".to_owned() } else { addresses.join(" or ") };
        let node = topology.node_of(rank);
        text += &format!("  rank {rank}: node {node}, pid {}, {address}\n", card.pid);
    }
    text
}
