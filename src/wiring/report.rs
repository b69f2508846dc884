//! What ranks report to each other about each step of connecting.

use unisum_link::{Rank, Refusal};

use crate::{Error, ErrorKind};

/// The outcome of agreeing on nodes, on one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Report {
    /// It is in the set of this rank, whose memory it has.
    Shares(Rank),
    Alone(Refusal),
}

impl Report {
    pub(super) const fn leader(&self) -> Option<Rank> {
        match self {
            Self::Shares(leader) => Some(*leader),
            Self::Alone(_) => None,
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Shares(leader) => encode(Ok(leader.to_string().as_bytes())),
            Self::Alone(refusal) => encode(Err(refusal)),
        }
    }

    /// Decodes a report; what cannot be decoded counts as the rank's own reason.
    pub(super) fn decode(bytes: &[u8]) -> Self {
        let garbage = || Refusal::Own(String::from_utf8_lossy(bytes).into_owned());
        match decode(bytes) {
            Ok(leader) => {
                let leader = std::str::from_utf8(leader).ok().and_then(|text| text.parse().ok());
                leader.map_or_else(|| Self::Alone(garbage()), Self::Shares)
            }
            Err(refusal) => Self::Alone(refusal),
        }
    }
}

/// What a rank tells of a step: what the step gave, or why it gave nothing.
pub(super) fn encode(own: Result<&[u8], &Refusal>) -> Vec<u8> {
    let text = match own {
        Ok(told) => return [b"+", told].concat(),
        Err(Refusal::NotWanted(why)) => format!("={why}"),
        Err(Refusal::Own(why)) => format!("-{why}"),
        Err(Refusal::Lacks(why)) => format!("~{why}"),
        Err(Refusal::Others(ranks, why)) => {
            let ranks: Vec<String> = ranks.iter().map(ToString::to_string).collect();
            format!("!{}:{why}", ranks.join(","))
        }
    };
    text.into_bytes()
}

/// Reads what a rank told; what cannot be read counts as the rank's own reason.
pub(super) fn decode(bytes: &[u8]) -> Result<&[u8], Refusal> {
    if let Some((b'+', told)) = bytes.split_first() {
        return Ok(told);
    }
    let text = String::from_utf8_lossy(bytes);
    Err(parse(&text).unwrap_or_else(|| match text.is_empty() {
        true => Refusal::Own("it has given up".into()),
        false => Refusal::Own(text.into_owned()),
    }))
}

fn parse(text: &str) -> Option<Refusal> {
    let (kind, rest) = text.split_at_checked(1)?;
    Some(match kind {
        "=" => Refusal::NotWanted(rest.into()),
        "-" => Refusal::Own(rest.into()),
        "~" => Refusal::Lacks(rest.into()),
        "!" => {
            let (ranks, why) = rest.split_once(':')?;
            let ranks = ranks.split(',').map(str::parse).collect::<Result<_, _>>().ok()?;
            Refusal::Others(ranks, why.into())
        }
        _ => return None,
    })
}

/// Logs that rank `rank` shares no memory: as a warning if only that rank's log says why, as
/// information if that was expected or another rank reports the cause.
pub(super) fn log(refusal: &Refusal, rank: Rank, reports: &[Report]) {
    let tells = |&other: &Rank| {
        let report = reports.get(other);
        let tells = |it: &Refusal| !matches!(it, Refusal::NotWanted(_));
        matches!(report, Some(Report::Alone(refusal)) if tells(refusal))
    };
    let is_news = match refusal {
        Refusal::NotWanted(_) => false,
        Refusal::Own(_) | Refusal::Lacks(_) => true,
        Refusal::Others(ranks, _) => !ranks.iter().any(tells),
    };
    let why = refusal.why();
    if is_news {
        unisum_link::warning!("rank {rank} shares no memory with the ranks of its host: {why}");
    } else {
        tracing::info!("rank {rank} shares no memory: {why}");
    }
}

/// The error of rank `rank` if all ranks must share memory and don't, with the same failed ranks on
/// all. Those that have run out of something are the cause, or else those with a reason of their
/// own, or else those that prevent others, or else those on another host than rank 0.
pub(super) fn not_all_share(
    transport: &str,
    rank: Rank,
    leaders: &[Option<Rank>],
    reports: &[Report],
) -> Error {
    let lacks = |report: &Report| matches!(report, Report::Alone(Refusal::Lacks(_)));
    let kind = match reports.iter().any(lacks) {
        true => ErrorKind::Resources,
        false => ErrorKind::Configuration,
    };
    let mut lacking: Vec<(Rank, &str)> = Vec::new();
    let (mut blamed, mut reasons): (Vec<Rank>, Vec<(Rank, &str)>) = (Vec::new(), Vec::new());
    for (rank, report) in reports.iter().enumerate() {
        match report {
            Report::Alone(Refusal::Lacks(why)) => lacking.push((rank, why)),
            Report::Alone(Refusal::Own(why)) if kind == ErrorKind::Configuration => {
                lacking.push((rank, why));
            }
            Report::Alone(Refusal::Own(why)) => reasons.push((rank, why)),
            Report::Alone(Refusal::Others(ranks, why)) => {
                blamed.extend(ranks);
                reasons.push((rank, why));
            }
            Report::Alone(Refusal::NotWanted(why)) => reasons.push((rank, why)),
            Report::Shares(_) => {}
        }
    }
    let apart =
        || (1..leaders.len()).filter(|&it| leaders[it].is_none() || leaders[it] != leaders[0]);
    let (failed_ranks, reasons): (Vec<Rank>, _) = match (lacking.is_empty(), blamed.is_empty()) {
        (false, _) => (lacking.iter().map(|&(rank, _)| rank).collect(), lacking),
        (true, false) => (blamed, reasons),
        (true, true) => (apart().collect(), reasons),
    };
    let mut failed_ranks = failed_ranks;
    failed_ranks.sort_unstable();
    failed_ranks.dedup();
    let reasons: Vec<String> =
        reasons.iter().map(|(rank, why)| format!("rank {rank}: {why}")).collect();
    let why =
        if reasons.is_empty() { "they are on other hosts".into() } else { reasons.join("; ") };
    let text = format!(
        "transport {transport} was asked for, but ranks {:?} share no memory with rank 0 ({why})",
        apart().collect::<Vec<_>>(),
    );
    Error::new(kind, text).on(rank).caused_by(failed_ranks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(why: &str) -> Report {
        Report::Alone(Refusal::Own(why.into()))
    }

    fn lacks(why: &str) -> Report {
        Report::Alone(Refusal::Lacks(why.into()))
    }

    fn others(ranks: &[Rank]) -> Report {
        Report::Alone(Refusal::Others(ranks.to_vec(), "it: gave up".into()))
    }

    fn not_wanted() -> Report {
        Report::Alone(Refusal::NotWanted("no other rank shares this host".into()))
    }

    #[test]
    fn reports_survive_the_wire_and_garbage_is_a_reason() {
        for report in
            [Report::Shares(70), own("no: 3"), lacks("!-"), others(&[1, 20]), not_wanted()]
        {
            assert_eq!(Report::decode(&report.encode()), report);
        }
        for garbage in ["+", "+x", "!", "!:", "!1,:x", "?", "ö"] {
            assert_eq!(Report::decode(garbage.as_bytes()), own(garbage));
        }
        assert_eq!(Report::decode(b""), own("it has given up"));
    }

    #[test]
    fn the_rank_that_lacks_something_is_the_culprit_on_all() {
        let failed_ranks = |reports: &[Report]| -> Vec<Rank> {
            let leaders: Vec<_> = reports.iter().map(Report::leader).collect();
            let errors =
                (0..reports.len()).map(|rank| not_all_share("shm", rank, &leaders, reports));
            let mut failed_ranks: Vec<_> =
                errors.map(|error| error.failed_ranks().to_vec()).collect();
            failed_ranks.dedup();
            assert_eq!(failed_ranks.len(), 1, "the same on all");
            failed_ranks.remove(0)
        };
        // A member; the leader, whose members are refused; two.
        assert_eq!(
            failed_ranks(&[Report::Shares(0), own("out of memory"), Report::Shares(0)]),
            [1]
        );
        assert_eq!(failed_ranks(&[own("no descriptors"), others(&[0]), others(&[0])]), [0]);
        assert_eq!(failed_ranks(&[own("a"), own("b"), others(&[0])]), [0, 1]);
        // One that was never heard of, and hosts apart.
        assert_eq!(failed_ranks(&[Report::Shares(0), others(&[0]), Report::Shares(0)]), [0]);
        assert_eq!(failed_ranks(&[Report::Shares(0), Report::Shares(0), not_wanted()]), [2]);
        let two_hosts = [0, 0, 2, 2].map(Report::Shares);
        assert_eq!(failed_ranks(&two_hosts), [2, 3]);
        // Who has run out of something is the cause, and not the one that gave up because of it.
        assert_eq!(failed_ranks(&[own("a"), lacks("b"), others(&[0])]), [1]);
    }

    #[test]
    fn a_lack_has_its_own_kind() {
        let kind = |reports: &[Report]| {
            let leaders: Vec<_> = reports.iter().map(Report::leader).collect();
            not_all_share("shm", 0, &leaders, reports).kind()
        };
        assert_eq!(kind(&[Report::Shares(0), lacks("no descriptors")]), ErrorKind::Resources);
        assert_eq!(kind(&[lacks("no descriptors"), own("a")]), ErrorKind::Resources);
        assert_eq!(kind(&[Report::Shares(0), own("a")]), ErrorKind::Configuration);
    }
}
