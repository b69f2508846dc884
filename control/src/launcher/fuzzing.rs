//! What must hold of what launchers set, whatever they set.

use unisum_link::fuzzing::Target;

use super::pmi::{Exchange, Step};
use super::{Source, Token, detect, hostlist};
use crate::address::Rendezvous;
use crate::fuzzing::environment;

pub(crate) const TARGETS: &[Target] = &[
    Target { name: "launcher", check: check_launcher, seeds: launcher_seeds },
    Target { name: "hostlist", check: check_hostlist, seeds: hostlist_seeds },
    Target { name: "pmi", check: check_pmi, seeds: pmi_seeds },
    Target { name: "token", check: check_token, seeds: token_seeds },
];

/// A placement that is found is one in its world and on its host, with a place to meet if there is
/// anybody to meet.
fn check_launcher(bytes: &[u8]) {
    let Ok(found) = detect(&environment(bytes)) else { return };
    assert!(found.rank < found.world);
    assert!(found.source != Source::Single || found.world == 1);
    assert!(found.local_size.is_none_or(|size| (1..=found.world).contains(&size)));
    let limit = found.local_size.unwrap_or(found.world);
    assert!(found.local_rank.is_none_or(|rank| rank < limit));
    assert!(!found.job.is_empty() && !found.to_string().is_empty());
    assert!(found.world == 1 || found.rendezvous.is_some());
    if let Some(Rendezvous::Tcp { host, port }) = found.rendezvous {
        assert!(Rendezvous::tcp(&host, port).is_ok());
    }
}

fn launcher_seeds() -> Vec<Vec<u8>> {
    let environments = [
        "RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=10.0.0.1 \
         MASTER_PORT=29500 TORCHELASTIC_RUN_ID=none TORCHELASTIC_USE_AGENT_STORE=True",
        "SLURM_JOB_ID=77 SLURM_STEP_ID=0 SLURM_PROCID=5 SLURM_STEP_NUM_TASKS=7 SLURM_LOCALID=1 \
         SLURM_NODEID=2 SLURM_STEP_TASKS_PER_NODE=2(x3),1 SLURM_STEP_NODELIST=node[09-11],gpu1",
        "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4 UNISUM_RENDEZVOUS=tcp://[::1]:80 \
         PMIX_RANK=1",
        "PMI_RANK=2 PMI_SIZE=3 MPI_LOCALRANKID=2 PALS_RANKID=2 MASTER_ADDR=h UNISUM_PORT=7",
        "FLUX_TASK_RANK=1 FLUX_JOB_SIZE=2 FLUX_JOB_NNODES=2 UNISUM_JOB=mine",
        "PET_NODE_RANK=1 PET_NNODES=2 PET_MASTER_ADDR=h PET_MASTER_PORT=9 PET_NPROC_PER_NODE=1",
        "LWS_WORKER_INDEX=1 LWS_GROUP_SIZE=2 LWS_LEADER_ADDRESS=leader.svc",
        "JOB_COMPLETION_INDEX=1 UNISUM_WORLD=2 UNISUM_RENDEZVOUS=file:///shared/x",
        "UNISUM_RANK=0 UNISUM_WORLD=2 UNISUM_LOCAL_RANK=0 UNISUM_LOCAL_SIZE=1 MASTER_ADDR=[::1] \
         MASTER_PORT=1",
    ];
    environments.map(|pairs| pairs.replace(' ', "\n").into_bytes()).to_vec()
}

/// A list gives no more hosts than asked for, and the same first ones whatever is asked for; all
/// are names. The first byte is how many.
fn check_hostlist(bytes: &[u8]) {
    let Some((&limit, list)) = bytes.split_first() else { return };
    let (list, limit) = (String::from_utf8_lossy(list), usize::from(limit));
    let (first, more) = (hostlist::expand(&list, limit), hostlist::expand(&list, 2 * limit));
    assert_eq!(first.is_ok(), more.is_ok());
    let (Ok(first), Ok(more)) = (first, more) else { return };
    assert_eq!(first, more[..more.len().min(limit)]);
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    assert!(first.iter().all(|host| !host.is_empty() && host.bytes().all(is_plain)));
}

fn hostlist_seeds() -> Vec<Vec<u8>> {
    ["\x05node[01-03,7],gpu[1-2]x", "\x02r[0-9]n[0-9999999999999999999]"].map(Vec::from).to_vec()
}

/// Whatever mpiexec answers, an exchange comes to an end after at most as many lines as PMI-1 has,
/// and each line that is sent is one. The first byte says whether this rank puts a value.
fn check_pmi(bytes: &[u8]) {
    let Some((&first, answers)) = bytes.split_first() else { return };
    let value = (first % 2 == 1).then_some(&answers[..answers.len().min(100)]);
    let mut exchange = Exchange::new(value);
    let answers = String::from_utf8_lossy(answers);
    for (at, answer) in answers.split_inclusive('\n').enumerate() {
        match exchange.answer(answer) {
            Ok(Step::Send(line)) => {
                assert!(line.starts_with("cmd=") && line.find('\n') == Some(line.len() - 1));
            }
            Ok(Step::Done(got)) => return assert!(got.is_some() == value.is_none()),
            Err(error) => return assert!(!error.is_empty() && !error.contains('\n')),
        }
        assert!(at < 6, "six answers, and then the end");
    }
}

fn pmi_seeds() -> Vec<Vec<u8>> {
    let opening = "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0\ncmd=maxes \
                   kvsname_max=256 keylen_max=64 vallen_max=1024\ncmd=my_kvsname kvsname=k\n";
    let put = "\x01cmd=put_result rc=0 msg=success\ncmd=barrier_out\ncmd=finalize_ack\n";
    let get = "\x00cmd=barrier_out\ncmd=get_result rc=0 value=a%20b\ncmd=finalize_ack\n";
    let whole = |end: &str| format!("{}{opening}{}", &end[..1], &end[1..]).into_bytes();
    vec![whole(put), whole(get)]
}

/// A token that is accepted is long enough to be a secret, and is not printed.
fn check_token(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    // Without a token, the user's own file would be read.
    if text.is_empty() {
        return;
    }
    if let Ok(token) = Token::from_environment(&[("UNISUM_TOKEN", text)].into_iter().collect()) {
        assert!(token.as_bytes().len() >= 16);
        assert_eq!(format!("{token:?}"), r#"Token { origin: "UNISUM_TOKEN", .. }"#);
    }
}

fn token_seeds() -> Vec<Vec<u8>> {
    vec![b"0123456789abcdef0123456789abcdef".to_vec(), vec![b'x'; 5000]]
}
