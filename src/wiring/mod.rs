//! Joining: from rank and world to an engine whose links reach everybody.
//!
//! All ranks go through the same exchanges over the control connection: cards (where is who, and
//! with which settings), who shares memory with whom, and what the links were measured to cost.

pub(crate) mod builtin;
pub(crate) mod store;

mod bond;
mod calibrate;
mod card;
mod chronicle;
mod control;
mod cores;
mod costs;
mod description;
mod earlier;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod group;
mod group_control;
mod job;
mod joining;
mod lineage;
mod meeting;
mod node;
mod pairs;
mod report;
mod standing;
mod transports;
mod unanimous;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use unisum_algorithms::Topology;
use unisum_link::secure::Credentials;
use unisum_link::{Connected, Limit, Rank, Refusal, Setup, Site};

use crate::autotuning::selector::{self, AlgorithmSelector};
use crate::execution::membership::Membership;
use crate::settings::Settings;
use crate::{Elastic, Error, ErrorKind};
pub(crate) use bond::Bond;
use card::Card;
use cores::Cores;
use costs::MeasureContext;
pub use description::{Description, MeasuredCost, RankDescription, Rates};
pub(crate) use group::{Group, Member, Outcome, Parent};
pub(crate) use job::Job;
pub(crate) use lineage::{Epoch, Lineage, identities};
pub(crate) use meeting::Meeting;
use node::{JoinContext, Node, NodeEndpoint};
pub(crate) use standing::{Decided, Position, Standing, Verdict as StepVerdict};
pub(crate) use transports::Custom;
use unanimous::Unanimous;
use unisum_control::address::Rendezvous;
use unisum_control::launcher::{self, Detected};
use unisum_control::{Control, ControlError, Environment, Share, Verdict, VerdictKind};
use unisum_engine::{Engine, Links, Tuning};

/// What joining gave.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) job: Arc<Job>,
    pub(crate) engine: Engine,
    pub(crate) choice: AlgorithmSelector,
    pub(crate) tuning: Tuning,
    pub(crate) description: Description,
    /// By rank, how far it was as it entered the view of an elastic job.
    pub(crate) standings: Vec<Standing>,
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
    elasticity: Elasticity<'_>,
) -> Result<(Membership, Joined), Error> {
    let (rank, world, start) = (detected.rank, detected.world, Instant::now());
    let control = control::start_control(detected, settings, meeting);
    let control = Arc::new(control.inspect_err(|error| meeting.failed(error))?);
    let mut membership = Membership::of_job(control, rank, world);
    if let Elasticity::Continued(epoch, _) = elasticity {
        epoch.bind(membership.control());
        membership.enter(epoch.clone());
    }
    let by = (&membership, elasticity);
    let wired = wire(detected, settings, meeting, by, start).and_then(|joined| {
        if let Elasticity::Founded(elastic) = elasticity {
            let control = membership.control();
            let epoch = Lineage::found(elastic, settings, detected, meeting, control)?;
            membership.enter(epoch);
        }
        Ok(joined)
    });
    match wired {
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

/// Tells the others what keeps this rank from joining, if it is known how to reach them, or rank 0
/// how to listen for them. Blocks for 5 s at most, and for as long as the system's name resolver
/// does; where only PMIx knows how many ranks there are, for 30 s more. Where ranks meet by PMIx,
/// nobody is told: the program may join yet, and PMIx is opened once.
pub(crate) fn tell_that_not(environment: &Environment, why: &Error) {
    if launcher::meets_by_pmix(environment) {
        return;
    }
    let Ok(detected) = launcher::detect(environment) else { return };
    // A store is the program's.
    let meets = matches!(&detected.rendezvous, Some(it) if !matches!(it, Rendezvous::Store { .. }));
    // Rank 0 listens only as its settings say.
    let Some(settings) = Settings::only_to_meet(environment, detected.rank == 0) else { return };
    if detected.world > 1
        && meets
        && let Ok(meeting) = Meeting::by_token(environment, &settings)
    {
        control::tell_that_not(&detected, &settings, &meeting, why);
    }
}

/// Whether a job is elastic, and from when on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Elasticity<'a> {
    /// It is not.
    None,
    /// It begins.
    Founded(&'a Elastic),
    /// It goes on in this epoch; how far this rank is.
    Continued(&'a Epoch, &'a Standing),
}

impl Elasticity<'_> {
    fn standing(self) -> Vec<u8> {
        match self {
            Self::Continued(_, standing) => standing.encode(),
            Self::None | Self::Founded(_) => Vec::new(),
        }
    }
}

/// What all ranks have to say alike.
impl fmt::Display for Elasticity<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("0"),
            Self::Founded(Elastic { minimum }) => write!(f, "{minimum}"),
            Self::Continued(epoch, _) => write!(f, "epoch:{}", epoch.view.epoch),
        }
    }
}

/// The error of ranks that did not find each other, with what may help.
fn with_hint(error: Error, detected: &Detected) -> Error {
    // Those who were refused have found each other.
    let have_met = error.to_string().contains("refused: ");
    match detected.hint().filter(|_| !have_met) {
        Some(hint) => error.with_hint(&hint),
        None => error,
    }
}

/// Makes the links of the job's own communicator.
fn wire(
    detected: &Detected,
    settings: &Settings,
    meeting: &Meeting,
    (membership, elasticity): (&Membership, Elasticity<'_>),
    start: Instant,
) -> Result<Joined, Error> {
    let (rank, control) = (detected.rank, membership.control());
    let by = &meeting.credentials;
    let fixed = settings.algorithm.as_deref().map(selector::index_of).transpose()?;
    let within_hosts = transports::within_hosts(settings, by.secret());
    let endpoint = NodeEndpoint::new(within_hosts, settings, (rank, &membership.ranks()[..]));
    let cards = exchange_cards(control, detected, (settings, elasticity), &endpoint)?;
    if rank == 0 {
        warn_of_one_place(&cards);
    }
    // All are there, and none goes on without rank 0, which gives them what comes next.
    meeting.close();
    let wired = connect((detected, settings, by), membership, &cards, endpoint)?;
    let Wired { job, links, members, topology } = wired;
    let transport = links.names.join("+");
    let mut engine = links.engine(rank, job.ranks_and_cores(&members));
    engine.links().iter().for_each(|link| membership.add_waker(link.waker()));
    let tuning = Tuning { slice_bytes: settings.slice_bytes, window: settings.window };
    let context = {
        let (members, job, topology, transport) = (&members[..], &job, &topology, &transport[..]);
        MeasureContext { rank, members, job, topology, transport, tuning, membership }
    };
    let agreed = costs::agree(&mut engine, context)?;
    let protection = settings.tls.in_words(&transport);
    let links = engine.links().iter().map(|link| link.description());
    let description = Description {
        joined_in: Some(start.elapsed()),
        ranks: describe(&cards, &topology),
        protection: Some(protection.clone()),
        links: links.filter(|it| !it.is_empty()).collect(),
        costs: agreed.described(),
        notes: agreed.notes.clone(),
        ..Description::of(detected.to_string(), &transport)
    };
    tracing::info!("{}; {protection}", description.summary());
    let choice = agreed.choice(topology, &mut engine, tuning, fixed);
    let (job, standings) = (Arc::new(job), standings(&cards));
    Ok(Joined { job, engine, choice, tuning, description, standings })
}

/// How far the ranks of an elastic job were as they entered its view.
fn standings(cards: &[Card]) -> Vec<Standing> {
    cards.iter().filter_map(|card| Standing::decode(&card.standing)).collect()
}

/// What connecting a job's ranks gave.
struct Wired {
    job: Job,
    links: Assembly,
    /// The ranks of this rank's node.
    members: Vec<Rank>,
    topology: Topology,
}

/// Connects this rank with all others: those of its host, then all that have something better than
/// what reaches any rank, then the rest.
fn connect(
    (detected, settings, by): (&Detected, &Settings, &Credentials),
    membership: &Membership,
    cards: &[Card],
    endpoint: NodeEndpoint,
) -> Result<Wired, Error> {
    let (rank, world, control) = (detected.rank, detected.world, membership.control());
    let hosts: Vec<&str> = cards.iter().map(|card| card.host.as_str()).collect();
    let exchange = |share: Share| control.exchange(share).map_err(rendezvous_error);
    let circle = JoinContext {
        rank,
        hosts: &hosts,
        infos: cards.iter().map(|card| card.node.clone()).collect(),
        session: control.session(),
        exchange: &exchange,
        membership,
        is_group: false,
    };
    let within_hosts = endpoint.transport();
    let Node { members, connected, topology } = endpoint.join(&circle, settings)?;
    let mut job = Job::new(settings, by, detected, cards, control)?;
    if let Some(connected) = &connected {
        job.within_hosts(within_hosts, connected);
    }
    let others = others(&members, world);
    let mut links = Assembly::new(world);
    if let Some(connected) = connected {
        links.add(job.within_hosts.name(), connected, &members, membership);
    }
    let ways = job.ways(membership.ranks());
    let unanimous = Unanimous {
        rank,
        known_as: &membership.ranks()[..],
        others: &others,
        topology: &topology,
        session: control.session(),
        settings,
        membership,
        exchange: &exchange,
        is_group: false,
        instead: job.to_any.name(),
        ways: ways.as_ref(),
    };
    for transport in transports::unanimous(settings) {
        if !others.is_empty()
            && let Some(connected) = unanimous.connect(&*transport)?
        {
            job.unanimous(&transport, &connected);
            links.add(transport.name(), connected, &others, membership);
            break;
        }
    }
    let session = (rank, control.session());
    links.reach_the_others(&job, &others, membership, session).map_err(at_start)?;
    Ok(Wired { job, links, members, topology })
}

/// The ranks that share no memory with this one.
fn others(members: &[Rank], world: usize) -> Vec<Rank> {
    (0..world).filter(|peer| !members.contains(peer)).collect()
}

/// The route to a rank that no link reaches yet, and to this one.
const UNREACHED: usize = usize::MAX;

/// The links of a communicator, while they are put together.
struct Assembly {
    names: Vec<&'static str>,
    links: Links,
}

impl Assembly {
    fn new(world: usize) -> Self {
        let links = Links { all: Vec::new(), route: vec![UNREACHED; world], group: None };
        Self { names: Vec::new(), links }
    }

    fn add(
        &mut self,
        name: &'static str,
        connected: Connected,
        ranks: &[Rank],
        membership: &Membership,
    ) {
        let Connected { mut link, inbox, .. } = connected;
        if let Some(inbox) = inbox {
            membership.set_inbox(inbox);
        }
        let index = self.links.all.len();
        if link.group().is_some() {
            self.links.group = Some(index);
        }
        ranks.iter().for_each(|&rank| self.links.route[rank] = index);
        self.names.push(name);
        self.links.all.push(link);
    }

    /// Adds a link to the ranks that share no memory with this one, if none reaches them yet.
    fn reach_the_others(
        &mut self,
        job: &Job,
        others: &[Rank],
        membership: &Membership,
        (rank, session): (Rank, [u8; 16]),
    ) -> Result<(), Error> {
        let is_reached = |&peer: &Rank| self.links.route[peer] < self.links.all.len();
        let (transport, settings) = (&job.to_any, &job.settings);
        if others.iter().all(is_reached) {
            return Ok(());
        }
        let is_asked_for = settings.transport.is(transport.name());
        let ranks = &job.known_to_any(membership.ranks())[..];
        let site = Site { rank, ranks, peers: others, is_asked_for };
        let is_over = || membership.verdict().is_some();
        let limit = Limit::new(Instant::now() + settings.connect_timeout / 2, &is_over);
        let mut members = [others, &[rank]].concat();
        members.sort_unstable();
        let endpoint = transport.endpoint(&site);
        let connected =
            endpoint.and_then(|it| it.connect(&members, &Setup { session, limit, ways: None }));
        let connected = connected.map_err(|refusal| {
            let kind = match refusal {
                Refusal::NotWanted(_) => ErrorKind::Configuration,
                Refusal::Lacks(_) => ErrorKind::Resources,
                Refusal::Own(_) | Refusal::Others(..) => ErrorKind::Rendezvous,
            };
            Error::new(kind, refusal.why()).on(rank)
        })?;
        self.add(transport.name(), connected, others, membership);
        Ok(())
    }

    /// The engine of a rank on whose host so many ranks have so many cores.
    fn engine(mut self, rank: Rank, (ranks, cores): (usize, usize)) -> Engine {
        // It is not used, and names a link.
        self.links.route[rank] = 0;
        Engine::new(rank, self.links, ranks as f64 / cores as f64)
    }
}

/// Warns of ranks of one host that were given the same place there, by which programs choose
/// devices. Two launchers may have started ranks on one host: each then counts its own only.
fn warn_of_one_place(cards: &[Card]) {
    let mut taken = BTreeMap::new();
    for (rank, card) in cards.iter().enumerate() {
        let Some((local_rank, local_size)) = card.place else { continue };
        let here = cards.iter().filter(|other| other.host == card.host).count();
        if here != local_size as usize {
            continue;
        }
        if let Some(first) = taken.insert((&card.host, local_rank), rank) {
            unisum_link::warning!(
                "ranks {first} and {rank} of one host both have local rank {local_rank}: is \
                 LOCAL_RANK or UNISUM_LOCAL_RANK the same twice?"
            );
        }
    }
}

fn exchange_cards(
    control: &Control,
    detected: &Detected,
    (settings, elasticity): (&Settings, Elasticity<'_>),
    endpoint: &NodeEndpoint,
) -> Result<Vec<Card>, Error> {
    let rank = detected.rank;
    let place = detected.local_rank.zip(detected.local_size);
    let card = Card {
        place: place.map(|(rank, size)| (rank as u32, size as u32)),
        addresses: control.addresses().to_vec(),
        host: node::host_name(),
        pid: std::process::id(),
        cores: Cores::own(),
        settings: told_settings(settings, elasticity),
        node: endpoint.info(),
        standing: elasticity.standing(),
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

/// All that has to be the same on all ranks.
fn told_settings(settings: &Settings, elasticity: Elasticity<'_>) -> String {
    format!(
        "{} UNISUM_REPLAY={} UNISUM_TIMEOUT={} UNISUM_RECONNECT_TIMEOUT={} \
         UNISUM_ELASTIC={elasticity} transports={}",
        common_settings(settings),
        if settings.replay.is_some() { "set" } else { "" },
        settings.timeout.as_secs_f64(),
        settings.reconnect_timeout.as_secs_f64(),
        settings.custom.names().collect::<Vec<_>>().join(",")
    )
}

/// The settings that have to be the same on all ranks, as a user would write them, but for the
/// time limits of calls and of broken connections: these change nothing of what a file says.
fn common_settings(settings: &Settings) -> String {
    let algorithm = settings.algorithm.as_deref().unwrap_or("auto");
    let Settings { transport, slice_bytes, window, sockets_per_peer, .. } = settings;
    let reproducible = u8::from(settings.reproducible);
    let multimem = u8::from(settings.multimem);
    // Rank 0's file counts, whatever it is called elsewhere.
    let tuning = if settings.tuning.is_some() { "set" } else { "" };
    format!(
        "UNISUM_TRANSPORT={transport} UNISUM_ALGORITHM={algorithm} \
         UNISUM_SLICE_BYTES={slice_bytes} UNISUM_WINDOW={window} \
         UNISUM_TCP_SOCKETS={sockets_per_peer} UNISUM_REPRODUCIBLE={reproducible} \
         UNISUM_TUNING={tuning} UNISUM_MULTIMEM={multimem} UNISUM_TLS={}",
        settings.tls.level
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
        in_words(&ours),
        in_words(&theirs)
    );
    Err(Error::new(ErrorKind::Configuration, text).on(rank).caused_by(vec![other]))
}

/// Settings as a user would write them, or, where only that is known, whether they are set.
fn in_words(settings: &[&str]) -> String {
    let word = |setting: &&str| match setting.split_once('=') {
        Some((name, "")) => format!("no {name}"),
        Some((name, "set")) => format!("{name} set"),
        _ => (*setting).to_owned(),
    };
    settings.iter().map(word).collect::<Vec<_>>().join(", ")
}

/// What a rank lacks for its links, as all ranks call that if a start fails.
fn at_start(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Resources => Error::new(ErrorKind::Rendezvous, error.to_string()),
        _ => error,
    }
}

/// A failure while the links were made, as one to join.
fn starting_failed(judged: &Error, doing: &str) -> Error {
    let text = format!("{doing}: {judged}");
    Error::new(ErrorKind::Rendezvous, text).caused_by(judged.failed_ranks().to_vec())
}

fn rendezvous_error(error: ControlError) -> Error {
    let failed = Error::new(ErrorKind::Rendezvous, error.to_string());
    let failed = failed.caused_by(error.failed_ranks());
    if error.is_absence() { failed.of_absent() } else { failed }
}

fn describe(cards: &[Card], topology: &Topology) -> Vec<RankDescription> {
    let of = |(rank, card): (Rank, &Card)| RankDescription {
        node: topology.node_of(rank) as usize,
        pid: card.pid,
        addresses: card.addresses.iter().map(ToString::to_string).collect(),
    };
    cards.iter().enumerate().map(of).collect()
}
