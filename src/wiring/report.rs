//! What ranks tell each other of how sharing memory went.

use unisum_link::Rank;

use crate::{Error, ErrorKind};

/// How it went on one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Report {
    /// It has the memory of this leader.
    Shares(Rank),
    Alone(Refusal),
}

/// Why a rank shares no memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Nothing is wrong: nobody else is on its host, or it should not.
    NotWanted(String),
    /// It lacks something itself.
    Own(String),
    /// Other ranks, which are named, stand in the way.
    Others(Vec<Rank>, String),
}

impl Report {
    pub(super) const fn leader(&self) -> Option<Rank> {
        match self {
            Self::Shares(leader) => Some(*leader),
            Self::Alone(_) => None,
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let text = match self {
            Self::Shares(leader) => format!("+{leader}"),
            Self::Alone(Refusal::NotWanted(why)) => format!("={why}"),
            Self::Alone(Refusal::Own(why)) => format!("-{why}"),
            Self::Alone(Refusal::Others(ranks, why)) => {
                let ranks: Vec<String> = ranks.iter().map(ToString::to_string).collect();
                format!("!{}:{why}", ranks.join(","))
            }
        };
        text.into_bytes()
    }

    /// Reads it; what makes no sense is taken for the rank's own reason.
    pub(super) fn decode(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        Self::parse(&text).unwrap_or_else(|| Self::Alone(Refusal::Own(text.into_owned())))
    }

    fn parse(text: &str) -> Option<Self> {
        let (kind, rest) = text.split_at_checked(1)?;
        Some(match kind {
            "+" => Self::Shares(rest.parse().ok()?),
            "=" => Self::Alone(Refusal::NotWanted(rest.into())),
            "-" => Self::Alone(Refusal::Own(rest.into())),
            "!" => {
                let (ranks, why) = rest.split_once(':')?;
                let ranks = ranks.split(',').map(str::parse).collect::<Result<_, _>>().ok()?;
                Self::Alone(Refusal::Others(ranks, why.into()))
            }
            _ => return None,
        })
    }
}

impl Refusal {
    pub(super) fn why(&self) -> &str {
        match self {
            Self::NotWanted(why) | Self::Own(why) | Self::Others(_, why) => why,
        }
    }

    /// Says that rank `rank` shares no memory: as a warning if nothing but that rank's log tells
    /// why, as information if that was expected or another rank tells the cause.
    pub(super) fn log(&self, rank: Rank, reports: &[Report]) {
        let tells = |&other: &Rank| {
            matches!(reports.get(other), Some(Report::Alone(Self::Own(_) | Self::Others(..))))
        };
        let is_news = match self {
            Self::NotWanted(_) => false,
            Self::Own(_) => true,
            Self::Others(ranks, _) => !ranks.iter().any(tells),
        };
        let why = self.why();
        if is_news {
            tracing::warn!("rank {rank} shares no memory with the ranks of its host: {why}");
        } else {
            tracing::info!("rank {rank} shares no memory: {why}");
        }
    }
}

#[cfg(feature = "shm")]
impl From<unisum_shm::ShmError> for Refusal {
    fn from(error: unisum_shm::ShmError) -> Self {
        let (culprits, why) = (error.culprits(), error.to_string());
        match error {
            unisum_shm::ShmError::Alone => Self::NotWanted(why),
            _ if culprits.is_empty() => Self::Own(why),
            _ => Self::Others(culprits, why),
        }
    }
}

/// The error of rank `rank` where all have to share memory and don't: the same culprits on all.
/// Those that lack something are the cause, or else those that stand in the way of others, or else
/// those that are elsewhere than rank 0.
pub(super) fn not_all_share(rank: Rank, leaders: &[Option<Rank>], reports: &[Report]) -> Error {
    let mut lacking: Vec<(Rank, &str)> = Vec::new();
    let (mut blamed, mut reasons): (Vec<Rank>, Vec<(Rank, &str)>) = (Vec::new(), Vec::new());
    for (rank, report) in reports.iter().enumerate() {
        match report {
            Report::Alone(Refusal::Own(why)) => lacking.push((rank, why)),
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
    let (culprits, reasons): (Vec<Rank>, _) = match (lacking.is_empty(), blamed.is_empty()) {
        (false, _) => (lacking.iter().map(|&(rank, _)| rank).collect(), lacking),
        (true, false) => (blamed, reasons),
        (true, true) => (apart().collect(), reasons),
    };
    let mut culprits = culprits;
    culprits.sort_unstable();
    culprits.dedup();
    let reasons: Vec<String> =
        reasons.iter().map(|(rank, why)| format!("rank {rank}: {why}")).collect();
    let why =
        if reasons.is_empty() { "they are on other hosts".into() } else { reasons.join("; ") };
    let text = format!(
        "transport shm was asked for, but ranks {:?} share no memory with rank 0 ({why})",
        apart().collect::<Vec<_>>(),
    );
    Error::new(ErrorKind::Configuration, text).on(rank).caused_by(culprits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(why: &str) -> Report {
        Report::Alone(Refusal::Own(why.into()))
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
            [Report::Shares(70), own("no: 3"), others(&[0]), others(&[1, 20]), not_wanted()]
        {
            assert_eq!(Report::decode(&report.encode()), report);
        }
        for garbage in ["", "+", "+x", "!", "!:", "!1,:x", "?", "ö"] {
            assert_eq!(Report::decode(garbage.as_bytes()), own(garbage));
        }
    }

    #[test]
    fn the_rank_that_lacks_something_is_the_culprit_on_all() {
        let culprits = |reports: &[Report]| -> Vec<Rank> {
            let leaders: Vec<_> = reports.iter().map(Report::leader).collect();
            let errors = (0..reports.len()).map(|rank| not_all_share(rank, &leaders, reports));
            let mut culprits: Vec<_> = errors.map(|error| error.culprits().to_vec()).collect();
            culprits.dedup();
            assert_eq!(culprits.len(), 1, "the same on all");
            culprits.remove(0)
        };
        // A member; the leader, whose members are refused; two.
        assert_eq!(culprits(&[Report::Shares(0), own("out of memory"), Report::Shares(0)]), [1]);
        assert_eq!(culprits(&[own("no descriptors"), others(&[0]), others(&[0])]), [0]);
        assert_eq!(culprits(&[own("a"), own("b"), others(&[0])]), [0, 1]);
        // One that was never heard of, and hosts apart.
        assert_eq!(culprits(&[Report::Shares(0), others(&[0]), Report::Shares(0)]), [0]);
        assert_eq!(culprits(&[Report::Shares(0), Report::Shares(0), not_wanted()]), [2]);
        let two_hosts = [0, 0, 2, 2].map(Report::Shares);
        assert_eq!(culprits(&two_hosts), [2, 3]);
    }
}
