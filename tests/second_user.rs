//! A second user on the same host tries everything that docs/security.md lists, while a job of the
//! first one joins, makes groups and calls: it gets nothing, and the job does not notice.
//!
//! The ranks and the attacker are processes that give up being root. The same attempts by the
//! ranks' own user succeed, which shows that they are the right ones.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::fs;
use std::io::{self, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use support::{World, reach, setting, tell};
use unisum::{Communicator, ReduceOp};
use unisum_link::handshake::{Build, Hello, Purpose, Secret, job_hash};
use unisum_link::secure::{self, Credentials, Sealing};

#[test]
fn rank_process() {
    support::run_if_rank(&[("work", work), ("attack", attack)]);
}

const LIMIT: Duration = Duration::from_secs(100);
/// Users that no system has by default.
const OWNER: u32 = 64_001;
const STRANGER: u32 = 64_002;
const RANKS: usize = 3;
/// What the ranks have in common, in their environment or their home.
const TOKEN: &str = "kG7-a-token-that-nobody-else-is-to-see-kG7";
/// What their buffers and shared memory hold.
const PAYLOAD: &[u8] = b"weights!weights!weights!weights!";

/// From now on this process is `user`'s, as if that had started it.
fn become_user(user: u32) {
    // SAFETY: a plain system call, which concerns this process alone.
    assert_eq!(unsafe { libc::setgroups(0, std::ptr::null()) }, 0);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::setresgid(user, user, user) }, 0);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::setresuid(user, user, user) }, 0);
    // What the kernel takes from a process that changes its user.
    // SAFETY: as above.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1 as libc::c_ulong) }, 0);
}

/// Joins over shared memory and TCP, and makes groups until the attacker is done.
fn work() {
    become_user(OWNER);
    let home = PathBuf::from(setting("HOME"));
    let communicator = Communicator::from_environment().unwrap();
    tell(communicator.transport());
    let mut shared = communicator.allocate::<u8>(1 << 20).unwrap();
    let done = |communicator: &Communicator| {
        let mut is_done = [u8::from(home.join("done").exists())];
        communicator.broadcast(&mut is_done, 0).unwrap();
        is_done[0] == 1
    };
    reach("working");
    while !done(&communicator) {
        shared.chunks_exact_mut(PAYLOAD.len()).for_each(|part| part.copy_from_slice(PAYLOAD));
        communicator.all_reduce(&mut shared, ReduceOp::Max).unwrap();
        let group = communicator.duplicate().unwrap();
        group.all_reduce(&mut shared, ReduceOp::Max).unwrap();
        assert!(shared.chunks_exact(PAYLOAD.len()).all(|part| part == PAYLOAD));
    }
    tell("right");
}

/// A process that is attacked, and where its things are.
struct Victim {
    pid: i32,
    home: PathBuf,
    rendezvous: PathBuf,
}

/// What an attempt yielded, or why it did not.
type Gain = Result<String, String>;

fn denied(error: &io::Error) -> String {
    error.kind().to_string()
}

impl Victim {
    fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.pid.to_string()).join(name)
    }

    fn read(&self, name: &str) -> Gain {
        let bytes = fs::read(self.proc(name)).map_err(|error| denied(&error))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn environment(victim: &Victim) -> Gain {
    victim.read("environ").and_then(|text| match text.contains("UNISUM_JOB=attacked") {
        true => Ok("its variables".into()),
        false => Err("empty".into()),
    })
}

fn maps(victim: &Victim) -> Gain {
    victim
        .read("maps")
        .and_then(|text| if text.is_empty() { Err("empty".into()) } else { Ok(text) })
}

fn memory_file(victim: &Victim) -> Gain {
    let opened = fs::OpenOptions::new().read(true).write(true).open(victim.proc("mem"));
    opened.map(|_| "its memory".into()).map_err(|error| denied(&error))
}

/// The memory file that the ranks share has no name, but a descriptor.
fn memory_of_the_job(victim: &Victim) -> Gain {
    let entries = fs::read_dir(victim.proc("fd")).map_err(|error| denied(&error))?;
    for entry in entries.map_while(Result::ok) {
        let path = entry.path();
        let is_shared = fs::read_link(&path)
            .is_ok_and(|target| target.to_string_lossy().contains("memfd:unisum"));
        if is_shared {
            return fs::File::open(&path).map(|_| "shared memory".into()).map_err(|e| denied(&e));
        }
    }
    Err("no shared memory".into())
}

fn mapped_files(victim: &Victim) -> Gain {
    let entries = fs::read_dir(victim.proc("map_files")).map_err(|error| denied(&error))?;
    let mut entries = entries.map_while(Result::ok);
    entries.next().map(|_| "a mapped file".into()).ok_or_else(|| "empty".into())
}

fn result(value: i64, what: &str) -> Gain {
    if value >= 0 { Ok(what.into()) } else { Err(denied(&io::Error::last_os_error())) }
}

/// An address that the process has, if its map can be read.
fn address(victim: &Victim) -> *mut libc::c_void {
    let map = victim.read("maps").unwrap_or_default();
    let stack = map.lines().find(|line| line.ends_with("[stack]"));
    let end = stack.and_then(|line| line.split(['-', ' ']).nth(1));
    end.map_or(4096, |end| usize::from_str_radix(end, 16).unwrap() - 64) as *mut libc::c_void
}

fn read_memory(victim: &Victim) -> Gain {
    copy(victim, &mut [0; 16], false)
}

/// What is there already.
fn write_memory(victim: &Victim) -> Gain {
    let mut bytes = [0; 16];
    // Whose memory can't be read may be written, for all that one knows.
    let _ = copy(victim, &mut bytes, false);
    copy(victim, &mut bytes, true)
}

fn copy(victim: &Victim, bytes: &mut [u8; 16], is_written: bool) -> Gain {
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: address(victim), iov_len: bytes.len() };
    let copy = if is_written { libc::process_vm_writev } else { libc::process_vm_readv };
    // SAFETY: `bytes` lives during the call, which concerns nothing else of this process.
    let copied = unsafe { copy(victim.pid, &local, 1, &remote, 1, 0) };
    result(copied as i64, "its memory")
}

fn trace(victim: &Victim) -> Gain {
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: a tracee that is seized runs on, and is let go when this process ends.
    let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, victim.pid, none, none) };
    result(seized, "control over it")
}

fn descriptor(victim: &Victim) -> Gain {
    // SAFETY: plain system call.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, victim.pid, 0) };
    assert!(process >= 0, "{}", io::Error::last_os_error());
    // SAFETY: plain system call; what it gives is closed at this process's end.
    let copied = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process, 1, 0) };
    result(copied, "a descriptor")
}

fn signal(victim: &Victim) -> Gain {
    // One that nobody minds, where it is allowed.
    // SAFETY: plain system call.
    result(unsafe { libc::kill(victim.pid, libc::SIGURG) }.into(), "a signal")
}

fn limits(victim: &Victim) -> Gain {
    let mut limit = MaybeUninit::<libc::rlimit>::uninit();
    // SAFETY: plain system call, which writes `limit`.
    let asked = unsafe {
        libc::prlimit(victim.pid, libc::RLIMIT_NOFILE, std::ptr::null(), limit.as_mut_ptr())
    };
    result(asked.into(), "its limits")
}

fn processors(victim: &Victim) -> Gain {
    let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
    let bytes = size_of::<libc::cpu_set_t>();
    // SAFETY: plain system call, which writes `set`.
    let asked = unsafe { libc::sched_getaffinity(victim.pid, bytes, set.as_mut_ptr()) };
    assert_eq!(asked, 0);
    // SAFETY: plain system call: where it may run already.
    let set = unsafe { libc::sched_setaffinity(victim.pid, bytes, set.as_ptr()) };
    result(set.into(), "its processors")
}

fn token_file(victim: &Victim) -> Gain {
    let path = victim.home.join(".config/unisum/token");
    let token = fs::read_to_string(&path).map_err(|error| denied(&error))?;
    let name = path.with_file_name("other");
    fs::rename(&path, &name).map_err(|error| denied(&error))?;
    fs::rename(&name, &path).map_err(|error| denied(&error))?;
    if token.trim().is_empty() { Err("empty".into()) } else { Ok("the token".into()) }
}

fn replace_the_token_file(victim: &Victim) -> Gain {
    let folder = victim.home.join(".config/unisum");
    fs::write(folder.join("planted"), "planted").map_err(|error| denied(&error))?;
    fs::remove_file(folder.join("planted")).map_err(|error| denied(&error))?;
    Ok("files beside the token".into())
}

/// Where rank 0 listens is no secret, and is told in a folder of the owner's; but nobody else may
/// say another place.
fn rendezvous(victim: &Victim) -> Gain {
    let path = &victim.rendezvous;
    let text = fs::read_to_string(path).map_err(|error| denied(&error))?;
    assert!(!text.contains(TOKEN), "{text}");
    let opened = fs::OpenOptions::new().append(true).open(path);
    let beside = fs::write(path.with_file_name("planted"), "planted");
    let moved = fs::rename(path, path.with_file_name("moved"));
    if moved.is_ok() {
        fs::rename(path.with_file_name("moved"), path).unwrap();
    }
    opened.map(drop).and(beside).and(moved).map_err(|error| denied(&error))?;
    Ok("the meeting place".into())
}

/// Named places where a process may leave something.
fn files(victim: &Victim) -> Gain {
    let owner = fs::metadata(victim.proc("status")).map_err(|error| denied(&error))?.uid();
    let mut found = Err("no file that says anything".to_owned());
    let mut open = ["/dev/shm", "/tmp", "/dev/mqueue", "/run"].map(PathBuf::from).to_vec();
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().map_while(Result::ok) {
            let Ok(metadata) = entry.path().symlink_metadata() else { continue };
            if metadata.uid() != owner {
                continue;
            }
            if metadata.is_dir() {
                open.push(entry.path());
            } else if metadata.is_file() && metadata.len() < 16 << 20 {
                let text = fs::read(entry.path()).unwrap_or_default();
                let says = |what: &[u8]| text.windows(what.len()).any(|part| part == what);
                if says(TOKEN.as_bytes()) || says(PAYLOAD) {
                    found = Ok(format!("{}", entry.path().display()));
                }
            }
        }
    }
    found
}

/// Connects to each abstract socket of the host again and again, as leaders of groups open theirs
/// for moments, and takes what memory it is given.
fn sockets(_: &Victim) -> Gain {
    let until = Instant::now() + Duration::from_secs(1);
    let (mut met, mut why) = (0, String::new());
    while Instant::now() < until {
        let table = fs::read("/proc/net/unix").unwrap();
        for line in table.split(|&byte| byte == b'\n') {
            let Some(at) = line.iter().position(|&byte| byte == b'@') else { continue };
            // The kernel shows a NUL as an `@` there.
            let name: Vec<u8> = line[at + 1..].to_vec();
            // Those of others than unisum are none of this test's business.
            if name.len() != 32 {
                continue;
            }
            let Ok(address) = SocketAddr::from_abstract_name(&name) else { continue };
            let Ok(stream) = UnixStream::connect_addr(&address) else { continue };
            met += 1;
            match take_descriptor(&stream) {
                Ok(()) => return Ok("a descriptor".into()),
                Err(error) => why = denied(&error),
            }
        }
    }
    Err(format!("{met} sockets met, the last: {why}"))
}

fn take_descriptor(mut stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    // A challenge, to which there is no answer without the token.
    if stream.read(&mut [0; 256])? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    stream.write_all(&[7; 256])?;
    let mut bytes = [0; 256];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    recvmsg(stream, &mut parts, &mut control, RecvFlags::empty())?;
    let is_given =
        control.drain().any(|message| matches!(message, RecvAncillaryMessage::ScmRights(_)));
    if is_given { Ok(()) } else { Err(io::Error::other("no descriptor")) }
}

/// Ports on which the process listens, as anybody may know.
fn ports(owner: u32) -> Vec<u16> {
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row[3] == "0A" && row[7] == owner.to_string())
        .filter_map(|row| u16::from_str_radix(row[1].rsplit(':').next()?, 16).ok())
        .collect()
}

/// Speaks to each port as a rank of the job would, with a token that is none.
fn port(victim: &Victim) -> Gain {
    let owner = fs::metadata(victim.proc("status")).map_err(|error| denied(&error))?.uid();
    let ports = ports(owner);
    assert!(!ports.is_empty(), "they listen");
    let hello = Hello {
        purpose: Purpose::Control,
        socket: 0,
        from: 1,
        to: 0,
        world: RANKS as u32,
        session: [0; 16],
        job: job_hash("attacked"),
        build: Build::default(),
    };
    let mut why = Vec::new();
    for port in ports {
        for is_encrypted in [true, false] {
            let secret = Secret::new(b"somebody else's token, of some length");
            let credentials = match is_encrypted {
                true => Credentials::token(secret, Sealing::Everywhere).unwrap(),
                false => Credentials::clear(secret),
            };
            let mut stream =
                TcpStream::connect(("127.0.0.1", port)).map_err(|error| denied(&error))?;
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            match secure::dial(&mut stream, &hello, &credentials, true) {
                Ok(_) => return Ok(format!("a connection to {port}")),
                Err(error) => why.push(error.to_string()),
            }
        }
    }
    why.dedup();
    Err(why.join(", "))
}

/// What nobody can hide from others, and so must not say anything.
fn arguments(victim: &Victim) -> Gain {
    let told = ["cmdline", "comm", "stat", "status", "wchan", "limits"]
        .map(|name| victim.read(name).unwrap_or_default())
        .concat();
    if told.contains(TOKEN) { Ok("the token".into()) } else { Err("nothing secret".into()) }
}

type Attempt = (&'static str, fn(&Victim) -> Gain);

/// Those that the ranks' own user succeeds with come first.
const ATTEMPTS: [Attempt; 19] = [
    ("environment", environment),
    ("maps", maps),
    ("memory file", memory_file),
    ("shared memory", memory_of_the_job),
    ("mapped files", mapped_files),
    ("reading memory", read_memory),
    ("writing memory", write_memory),
    ("descriptors", descriptor),
    ("signals", signal),
    ("limits", limits),
    ("processors", processors),
    ("tracing", trace),
    ("token file", token_file),
    ("files beside the token", replace_the_token_file),
    ("rendezvous", rendezvous),
    ("named files", files),
    ("sockets", sockets),
    ("ports", port),
    ("arguments", arguments),
];
/// So many of them.
const OF_THE_OWNER: usize = 15;
/// The kernel has a rule against so many of those.
const OF_THE_KERNEL: usize = 12;

fn attack() {
    become_user(setting("AS").parse().unwrap());
    let victims: Vec<i32> = setting("VICTIMS").split(' ').map(|pid| pid.parse().unwrap()).collect();
    for pid in victims {
        let victim = Victim {
            pid,
            home: setting("VICTIMS_HOME").into(),
            rendezvous: setting("VICTIMS_RENDEZVOUS").into(),
        };
        for (name, attempt) in ATTEMPTS {
            match attempt(&victim) {
                Ok(gain) => tell(format!("{name}: gained {}", gain.lines().next().unwrap_or(""))),
                Err(why) => tell(format!("{name}: denied, {why}")),
            }
        }
    }
}

fn is_root() -> bool {
    // SAFETY: it always succeeds.
    let is_root = unsafe { libc::geteuid() } == 0;
    let required = std::env::var("UNISUM_TEST_NAMESPACES").is_ok_and(|it| it == "required");
    assert!(is_root || !required, "this test needs root, to be two users");
    if !is_root {
        println!("skipped: only root can be two users");
    }
    is_root
}

/// What `user` gets of processes, by the names of the attempts.
fn attempts(world: &World, user: u32, pids: &[i32]) -> Vec<String> {
    let pids: Vec<String> = pids.iter().map(i32::to_string).collect();
    let attacker = world.clone().set("VICTIMS", pids.join(" ")).set("AS", user);
    let told = attacker.succeed(LIMIT).remove(0);
    assert_eq!(told.len(), pids.len() * ATTEMPTS.len());
    told
}

fn check_stranger(told: &[String]) {
    for (at, told) in told.iter().enumerate() {
        let has_rule = at % ATTEMPTS.len() < OF_THE_KERNEL;
        let why = if has_rule { ": denied, permission denied" } else { ": denied, " };
        assert!(told.contains(why), "{told}");
    }
}

#[test]
fn another_user_gets_nothing() {
    if !is_root() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(home.path(), Some(OWNER), Some(OWNER)).unwrap();
    // So that others see what is in it, and no more than unisum lets them.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(home.path(), open).unwrap();
    for has_file in [false, true] {
        // There is none the first time.
        let _ = fs::remove_file(home.path().join("done"));
        attacked(home.path(), has_file);
    }
}

/// A job that is attacked while it waits for its last rank, and while it works.
fn attacked(home: &Path, has_file: bool) {
    let rendezvous = home.join(format!("world-{has_file}"));
    // A token of the user's file, which the ranks make.
    let unset = ["env", "-u", "UNISUM_TOKEN", "-u", "XDG_CONFIG_HOME"].map(str::to_owned);
    let unset = if has_file { unset.to_vec() } else { Vec::new() };
    let world = World::new(RANKS, "work")
        .owned_by(OWNER)
        .set("HOME", home.display())
        .set("UNISUM_JOB", "attacked")
        .set("UNISUM_TLS", "auto")
        .set("UNISUM_RENDEZVOUS", format!("file://{}", rendezvous.display()))
        .set("UNISUM_TOKEN", TOKEN)
        .through(move |_| unset.clone());
    let attack = World::new(1, "attack")
        .set("VICTIMS_HOME", home.display())
        .set("VICTIMS_RENDEZVOUS", rendezvous.display());
    let mut running = world.start_ranks(&[0, 1]);
    support::wait_until("rank 0 says where it listens", LIMIT, || rendezvous.exists());
    let waiting = [running.pid(0), running.pid(1)];
    check_stranger(&attempts(&attack, STRANGER, &waiting));
    let mut of_the_owner = attempts(&attack, OWNER, &waiting[..1]);
    running.add(&world, 2);
    running.wait_for("working", RANKS, LIMIT);
    let told = attempts(&attack, STRANGER, &[0, 1, 2].map(|rank| running.pid(rank)));
    println!("{:#?}", &told[..ATTEMPTS.len()]);
    check_stranger(&told);
    // Its own user gets all of it, at one of the times: so these were the right attempts.
    of_the_owner.extend(attempts(&attack, OWNER, &[running.pid(1)]));
    for (name, _) in &ATTEMPTS[..OF_THE_OWNER] {
        let has_none = !has_file && name.contains("token");
        let gain = format!("{name}: gained ");
        let is_gained = of_the_owner.iter().any(|told| told.starts_with(&gain));
        assert!(has_none || is_gained, "{name}: {of_the_owner:#?}");
    }
    fs::write(home.join("done"), "").unwrap();
    for ended in running.wait(LIMIT) {
        let last = ended.told.last().map(String::as_str);
        assert_eq!((ended.status, last), (0, Some("right")), "{ended:#?}");
        assert!(ended.told[0].contains("shm") && !ended.log.contains(TOKEN), "{ended:#?}");
    }
}
