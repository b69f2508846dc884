use super::*;
use std::sync::Condvar;

/// Servers of a job, which the threads of its ranks share.
#[derive(Default)]
struct Job {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    value: Option<Vec<u8>>,
    in_fence: usize,
    closed: usize,
}

/// One rank's server.
struct Fake {
    job: Arc<Job>,
    rank: u32,
    size: usize,
    /// At which call it refuses, and how.
    refuses: Option<(&'static str, Refusal)>,
    /// Does not answer in time, nor keep the time.
    hangs: bool,
}

impl Fake {
    fn new(job: &Arc<Job>, rank: u32, size: usize) -> Self {
        Self { job: job.clone(), rank, size, refuses: None, hangs: false }
    }

    fn call(&self, name: &str) -> Result<(), Refusal> {
        match &self.refuses {
            Some((at, refusal)) if *at == name => Err(refusal.clone()),
            _ => Ok(()),
        }
    }
}

impl Server for Fake {
    fn is_initialized(&self) -> bool {
        false
    }

    fn init(&mut self) -> Result<Identity, Refusal> {
        self.call("init")?;
        Ok(Identity { namespace: "job".to_owned(), rank: self.rank })
    }

    fn job_size(&self) -> Result<usize, Refusal> {
        self.call("job_size")?;
        Ok(self.size)
    }

    fn local_size(&self) -> Result<usize, Refusal> {
        self.call("local_size")?;
        Ok(1)
    }

    fn local_rank(&self) -> Result<usize, Refusal> {
        self.call("local_rank")?;
        Ok(0)
    }

    fn put(&self, _key: &str, value: &[u8]) -> Result<(), Refusal> {
        self.call("put")?;
        self.job.state.lock().unwrap().value = Some(value.to_vec());
        Ok(())
    }

    fn fence(&self, timeout: Duration) -> Result<(), Refusal> {
        self.call("fence")?;
        let mut state = self.job.state.lock().unwrap();
        state.in_fence += 1;
        self.job.changed.notify_all();
        let is_missing = |state: &mut State| state.in_fence < self.size;
        if self.hangs {
            drop(self.job.changed.wait_while(state, is_missing));
            return Ok(());
        }
        let (_state, late) =
            self.job.changed.wait_timeout_while(state, timeout, is_missing).unwrap();
        if late.timed_out() { Err(Refusal::TimedOut) } else { Ok(()) }
    }

    fn get(&self, rank: u32, _key: &str, _timeout: Duration) -> Result<Vec<u8>, Refusal> {
        self.call("get")?;
        assert_eq!(rank, 0);
        let value = self.job.state.lock().unwrap().value.clone();
        value.ok_or_else(|| Refusal::Other("NOT-FOUND".to_owned()))
    }

    fn finalize(&mut self) {
        self.job.state.lock().unwrap().closed += 1;
    }
}

fn who(rank: u32) -> Identity {
    Identity { namespace: "job".to_owned(), rank }
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn what_rank_0_puts_all_others_get_and_pmix_is_closed() {
    let job = Arc::new(Job::default());
    let ranks: Vec<_> = (0..3)
        .map(|rank| {
            let job = job.clone();
            thread::spawn(move || {
                let (placement, session) = open(Fake::new(&job, rank, 3), who(rank)).unwrap();
                assert_eq!((placement.world, placement.local_size), (3, Some(1)));
                let value = (rank == 0).then_some(&b"told"[..]);
                let shared = session.share(value, LONG);
                assert_eq!(session.share(value, LONG).unwrap_err(), ONCE);
                shared.unwrap()
            })
        })
        .collect();
    let told: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
    assert_eq!(told, [None, Some(b"told".to_vec()), Some(b"told".to_vec())]);
    assert_eq!(job.state.lock().unwrap().closed, 3);
}

#[test]
fn pmix_that_is_not_needed_is_closed_when_it_is_dropped() {
    let job = Arc::new(Job::default());
    let (_, session) = open(Fake::new(&job, 1, 2), who(1)).unwrap();
    assert_eq!(job.state.lock().unwrap().closed, 0);
    drop(session);
    assert_eq!(job.state.lock().unwrap().closed, 1);
}

#[test]
fn what_keeps_it_from_opening_is_told_and_it_is_closed() {
    let gone = Refusal::Gone("PMIx_Init: UNREACHABLE".to_owned());
    for (at, refusal, rank, size, words) in [
        ("init", gone, 0, 2, "no PMIx server of the launcher answers (PMIx_Init: UNREACHABLE)"),
        ("job_size", Refusal::TimedOut, 0, 2, "the job's size: the launcher's PMIx server did not"),
        ("none", Refusal::TimedOut, 1, 2, "knows this process, rank 0 of `job`"),
        ("none", Refusal::TimedOut, 0, 0, "has 0 ranks"),
        ("none", Refusal::TimedOut, 0, MAX_WORLD + 1, "ranks, and this one is 0"),
    ] {
        let job = Arc::new(Job::default());
        let mut server = Fake::new(&job, rank, size);
        server.refuses = Some((at, refusal));
        let error = open(server, who(0)).err().unwrap();
        assert!(error.contains(words), "{error}");
    }
    // Hosts are a matter of the launcher's goodwill.
    let job = Arc::new(Job::default());
    let mut server = Fake::new(&job, 1, 2);
    server.refuses = Some(("local_size", Refusal::Other("NOT-FOUND".to_owned())));
    let (placement, _session) = open(server, who(1)).unwrap();
    assert_eq!((placement.rank, placement.local_size), (1, None));
}

#[test]
fn ranks_that_do_not_come_and_servers_that_go_are_told_in_time() {
    let gone = Refusal::Gone("PMIx_Fence: LOST-CONNECTION".to_owned());
    for (refuses, hangs, words) in [
        (None, false, "not all ranks came within 0.2 s"),
        (None, true, "not all ranks came within 5.2 s"),
        (Some(("fence", gone)), false, "(PMIx_Fence: LOST-CONNECTION): set UNISUM_RENDEZVOUS=tcp:"),
        (Some(("put", Refusal::Other("DENIED".to_owned()))), false, "DENIED: set UNISUM_"),
    ] {
        let job = Arc::new(Job::default());
        let mut server = Fake::new(&job, 0, 2);
        (server.refuses, server.hangs) = (refuses, hangs);
        let (_, session) = open(server, who(0)).unwrap();
        let error = session.share(Some(b"told"), Duration::from_millis(200)).unwrap_err();
        assert!(error.contains(words), "{error}");
        // The thread of one that hangs would stay.
        job.state.lock().unwrap().in_fence += 1;
        job.changed.notify_all();
    }
}
