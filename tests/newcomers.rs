//! What somebody meets who writes a first program: README's lines, errors, warnings, names.

#![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

mod support;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::Command;
use std::ptr;
use std::time::{Duration, Instant};

use support::{World, tell};
use unisum::buckets::{Buckets, Compressed, Encoding, Parameter};
use unisum::{
    Buffers, Collective, Communicator, CustomOp, Dtype, Elastic, Error, LossScaler, Mesh, Message,
    Messenger, OutOfPlace, ReduceOp, Reduction, local,
};

#[test]
fn rank_process() {
    support::run_if_rank(&[
        ("lines", lines),
        ("places", places),
        ("described", described),
        ("placed", placed),
        ("compresses", compresses),
        ("warns_a_terminal", warns_a_terminal),
    ]);
}

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn every_line_of_the_readme_s_table_compiles_and_does_what_it_says() {
    let readme = include_str!("../README.md");
    let rows = readme.lines().skip_while(|line| !line.starts_with("| collective |"));
    let cells =
        rows.take_while(|line| line.starts_with('|')).filter_map(|row| row.split('|').nth(2));
    let mut written = BTreeSet::new();
    for cell in cells {
        let code = cell.split('`').skip(1).step_by(2).filter(|code| code.contains('('));
        written.extend(code.map(bare));
    }
    assert!(written.len() > 20, "the table is where this test looks: {written:?}");
    for told in World::new(2, "lines").succeed(LIMIT) {
        let run: BTreeSet<String> = told.into_iter().collect();
        assert_eq!(run, written);
    }
}

#[test]
fn a_process_that_nobody_started_as_a_rank_is_none() {
    assert!(!local::is_rank());
}

/// Without what does not matter.
fn bare(code: &str) -> String {
    code.split_whitespace().collect()
}

/// Runs a line of README's table, and tells it.
macro_rules! line {
    ($($code:tt)*) => {
        $($code)*;
        tell(bare(stringify!($($code)*)));
    };
}

struct Optimizer(u32);

impl Optimizer {
    fn step(&mut self) {
        self.0 += 1;
    }
}

fn lines() {
    assert!(local::is_rank());
    collectives().unwrap();
    beyond_collectives().unwrap();
    messages().unwrap();
    elastic().unwrap();
}

fn elastic() -> Result<(), Error> {
    line!(let comm = Communicator::builder().elastic(Elastic { minimum: 2 }).connect()?);
    let epoch = comm.view().map(|view| view.epoch);
    // Nobody is lost here.
    line!(let comm = comm.rebuild()?);
    assert_eq!(comm.view().map(|view| view.epoch), epoch.map(|epoch| epoch + 1));
    Ok(())
}

fn collectives() -> Result<(), Error> {
    let comm = Communicator::from_environment()?;
    let (rank, root) = (comm.rank(), 1);
    let mut data = [rank as f32 + 1.0; 4];
    line!(comm.all_reduce(&mut data, ReduceOp::Sum)?);
    assert_eq!(data, [3.0; 4]);
    data = [rank as f32; 4];
    line!(comm.reduce(&mut data, ReduceOp::Max, root)?);
    assert_eq!(data, [rank as f32; 4]);
    line!(comm.broadcast(&mut data, root)?);
    assert_eq!(data, [1.0; 4]);
    let (mut block, mut all) = ([rank as f32 + 1.0; 2], [0.0; 4]);
    line!(comm.all_gather(&block, &mut all)?);
    assert_eq!(all, [1.0, 1.0, 2.0, 2.0]);
    line!(comm.reduce_scatter(&all, &mut block, ReduceOp::Sum)?);
    assert_eq!(block, [2.0 * (rank as f32 + 1.0); 2]);
    let (blocks, mut received) = ([rank as f32, 10.0 + rank as f32], [0.0; 2]);
    line!(comm.all_to_all(&blocks, &mut received)?);
    assert_eq!(received, [10.0 * rank as f32, 10.0 * rank as f32 + 1.0]);
    line!(comm.gather(&block, &mut all, root)?);
    assert!(rank != root || all == [2.0, 2.0, 4.0, 4.0]);
    line!(comm.scatter(&all, &mut block, root)?);
    assert_eq!(block, [2.0 * (rank as f32 + 1.0); 2]);
    line!(comm.barrier()?);
    let counts = [1, 3];
    let block = [7.0, 8.0, 9.0][..counts[rank]].to_vec();
    line!(comm.run(
        &Collective::all_gather().with_counts(&counts),
        Buffers::OutOfPlace(&block, &mut all)
    )?);
    assert_eq!(all, [7.0, 7.0, 8.0, 9.0]);
    all = [1.0, 2.0, 3.0, 4.0];
    line!(comm.run(&Collective::reduce_scatter(ReduceOp::Sum), Buffers::InPlace(&mut all))?);
    assert_eq!(all[2 * rank..][..2], [[2.0, 4.0], [6.0, 8.0]][rank]);
    Ok(())
}

fn beyond_collectives() -> Result<(), Error> {
    let comm = Communicator::from_environment()?;
    let rank = comm.rank();
    let (block, all) = (vec![rank as f32], vec![0.0; 2]);
    line!(comm.start::<f32, _>(Collective::all_gather(), OutOfPlace(block, all)).wait()?);
    let collective = Collective::all_reduce(ReduceOp::Sum);
    let (mut bias, mut weight) = ([1_f32; 2], [2_f32; 3]);
    line!(comm.run_batch(
        &collective,
        &mut [Buffers::InPlace(&mut bias), Buffers::InPlace(&mut weight)]
    )?);
    assert_eq!((bias, weight), ([2.0; 2], [4.0; 3]));
    let mut data = [8.0, f32::INFINITY];
    let (mut scaler, mut optimizer) = (LossScaler::default(), Optimizer(0));
    line!(let outcome = comm.run(
        &Collective::all_reduce(Reduction::sum_scaled_by(0.125).detect_nonfinite()),
        Buffers::InPlace(&mut data)
    )?);
    assert!(outcome.nonfinite && data[0] == 2.0);
    line!(if scaler.update(outcome.nonfinite) {
        optimizer.step()
    });
    assert_eq!(optimizer.0, 0, "a step with an infinite gradient is skipped");
    let fold = |into: &mut [f32], from: &[f32]| {
        into.iter_mut().zip(from).for_each(|(into, from)| *into = into.max(*from));
    };
    let mut data = [rank as f32];
    line!(comm.all_reduce(&mut data, CustomOp::commutative(fold))?);
    assert_eq!(data, [1.0]);
    Ok(())
}

fn messages() -> Result<(), Error> {
    let comm = Communicator::from_environment()?;
    let (rank, color, key, ranks) = (comm.rank(), 0, 0, [1, 0]);
    line!(comm.split(Some(color), key)?);
    line!(comm.subset(&ranks)?);
    line!(comm.duplicate()?);
    let (rows, columns) = (1, 2);
    line!(Mesh::new(&comm, rows, columns)?);
    let (from, to, tag) = (1 - rank, 1 - rank, 7);
    let (mut data, out, mut inn) = ([rank as f32; 3], [rank as f32], [9_f32]);
    line!(let post = Messenger::new(&comm)?);
    line!(post.send(&data, to, tag)?);
    line!(post.receive(&mut data, from, tag)?);
    assert_eq!(data, [from as f32; 3]);
    line!(post.exchange(&mut [
        Message::Send { data: &out, to, tag },
        Message::Receive { data: &mut inn, from, tag }
    ])?);
    assert_eq!(inn, [from as f32]);
    let count = 5;
    line!(comm.allocate::<f32>(count)?);
    Ok(())
}

#[test]
fn an_error_prints_itself_alike_by_debug_and_display() {
    // What `main() -> Result<(), unisum::Error>` prints.
    let error = Communicator::builder().rank(3).connect().unwrap_err();
    assert_eq!(format!("{error:?}"), error.to_string());
    assert!(error.to_string().contains("UNISUM_WORLD"), "{error}");
}

#[test]
fn ranks_know_their_place_on_their_host() {
    for told in World::new(3, "places").succeed(LIMIT) {
        assert_eq!(told[0], told[1]);
    }
}

fn places() {
    let communicator = Communicator::from_environment().unwrap();
    let (rank, world) = (communicator.rank(), communicator.world());
    assert_eq!((communicator.local_rank(), communicator.local_size()), (rank, world));
    // In a group by the group's numbers: here the other way round.
    let group = communicator.split(Some(u32::from(rank > 0)), -(rank as i64)).unwrap().unwrap();
    tell(format!("{} of {}", group.local_rank(), group.local_size()));
    tell(format!("{} of {}", group.rank(), group.world()));
}

fn described() {
    tell(Communicator::from_environment().unwrap().describe().summary());
}

/// As a framework that knows its ranks.
fn placed() {
    let (rank, world) = (support::setting("UNISUM_RANK"), support::setting("UNISUM_WORLD"));
    let builder = Communicator::builder().rank(rank.parse().unwrap()).world(world.parse().unwrap());
    tell(builder.connect().unwrap().describe().summary());
}

#[test]
fn it_is_said_who_gave_the_ranks_their_numbers() {
    let told = &World::new(2, "described").succeed(LIMIT)[0];
    assert!(told[0].starts_with("rank 0 of 2 by UNISUM_RANK and UNISUM_WORLD, "), "{told:?}");
    let told = &World::new(2, "placed").succeed(LIMIT)[0];
    assert!(told[0].starts_with("rank 0 of 2 by the program, "), "{told:?}");
}

#[test]
fn what_has_no_use_and_places_given_twice_are_warned_of_by_rank_0() {
    let warned = |variables: &[(&str, &str)], local_ranks: [usize; 2]| {
        let world = variables
            .iter()
            .fold(World::new(2, "described"), |world, (name, value)| world.set(name, value));
        let place = |local_rank: usize| world.clone().set("UNISUM_LOCAL_RANK", local_rank);
        let mut running = place(local_ranks[0]).start_ranks(&[0]);
        running.add(&place(local_ranks[1]), 1);
        let ended = running.wait(LIMIT);
        assert!(ended.iter().all(|rank| rank.status == 0), "{ended:#?}");
        let lines = ended[0].log.lines().filter(|line| line.contains("WARN"));
        // This machine may be warned of, too.
        let words = ["local rank", "elastic"];
        let is_of_these = |line: &&str| words.iter().any(|word| line.contains(word));
        lines.filter(is_of_these).collect::<String>()
    };
    let size = ("UNISUM_LOCAL_SIZE", "2");
    assert_eq!(warned(&[size], [1, 0]), "");
    let told = warned(&[size], [0, 0]);
    assert!(told.contains("ranks 0 and 1 of one host both have local rank 0"), "{told}");
    // Two launchers that each have started one.
    assert_eq!(warned(&[("UNISUM_LOCAL_SIZE", "1")], [0, 0]), "");
    let log = std::env::temp_dir().display().to_string();
    for (variable, value, warning) in [
        ("UNISUM_EPOCH_LOG", &log[..], "UNISUM_EPOCH_LOG is for elastic jobs, and this is none"),
        ("UNISUM_MEMBERS", "/tmp/none", "UNISUM_MEMBERS is for elastic jobs, and this is none"),
        ("UNISUM_ELASTIC", "5", "an elastic job that needs 5 ranks has 2"),
    ] {
        let told = warned(&[(variable, value)], [0, 1]);
        assert!(told.contains(warning), "{told}");
    }
    assert_eq!(warned(&[("UNISUM_ELASTIC", "2")], [0, 1]), "");
}

/// Gradients in 8 bits on the wire, and as they are.
fn compresses() {
    let communicator = Communicator::from_environment().unwrap();
    let parameters = [Parameter::new("weight", &[8], Dtype::F32)];
    for name in ["as they are", "compressed"] {
        eprintln!("compression: {name}");
        let builder = Buckets::builder(&communicator);
        let builder = match name {
            "compressed" => builder.hook(Compressed::new(Encoding::Int8)),
            _ => builder,
        };
        builder.build(&parameters).unwrap();
    }
}

#[test]
fn compression_between_ranks_of_one_host_is_warned_of_once() {
    let ended = World::new(2, "compresses").run(LIMIT);
    assert!(ended.iter().all(|rank| rank.status == 0), "{ended:#?}");
    let (plain, compressed) = ended[0].log.split_once("compression: compressed").unwrap();
    assert_eq!(plain.matches("gradients are compressed").count(), 0, "{plain}");
    assert_eq!(compressed.matches("gradients are compressed").count(), 1, "{compressed}");
    assert_eq!(ended[1].log.matches("gradients are compressed").count(), 0);
}

/// There is room for the rendezvous file, but for nothing larger.
#[test]
fn a_limit_on_file_sizes_is_told_where_shared_memory_is_asked_for() {
    let limited = |_| ["sh", "-c", "ulimit -f 8; exec \"$@\"", "sh"].map(str::to_owned).to_vec();
    let world = World::new(2, "described").set("UNISUM_TRANSPORT", "shm").through(limited);
    let ended = world.run(LIMIT);
    assert!(ended.iter().all(|rank| rank.status != 0), "{ended:#?}");
    assert!(
        ended.iter().any(|rank| rank.log.contains("raise the limit (ulimit -f)")),
        "{ended:#?}"
    );
}

/// The body of a program that starts its ranks itself.
#[test]
fn plain_launcher() {
    if std::env::var("TEST_PLAIN").is_ok() {
        let error = local::spawn(1, |_| Command::new("true")).unwrap_err();
        eprintln!("unisum: {error}");
    }
}

#[test]
fn the_folder_that_ranks_can_not_meet_in_is_named() {
    let told = output("plain_launcher", &[("TMPDIR", "/proc/1")]);
    assert!(told.contains("unisum: making /proc/1/unisum-local-"), "{told}");
    assert!(told.contains("(TMPDIR)?"), "{told}");
}

/// The body of a program that has no subscriber for events.
#[test]
fn plain_program() {
    if std::env::var("TEST_PLAIN").is_ok() {
        take_events_if_asked();
        if std::env::var("TEST_FAULT").is_ok() {
            unisum_link::fault!("it ends here");
        }
        let communicator = Communicator::from_environment().unwrap();
        assert_eq!((communicator.world(), communicator.local_size()), (1, 1));
    }
}

/// Has this process a subscriber, as a program that takes events has.
fn take_events_if_asked() {
    if std::env::var("TEST_TAKES_EVENTS").is_ok() {
        tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    }
}

/// What such a program says on standard error.
fn said(variables: &[(&str, &str)]) -> String {
    output("plain_program", variables)
}

fn output(program: &str, variables: &[(&str, &str)]) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", program, "--nocapture"])
        .env("TEST_PLAIN", "1")
        .env_remove("UNISUM_LOG")
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn warnings_reach_standard_error_where_nobody_else_takes_them() {
    assert_eq!(said(&[]).matches("unisum:").count(), 0);
    let misspelt = ("UNISUM_TIMEOUTS", "1");
    assert!(
        said(&[misspelt]).contains("unisum: warning: unknown variables, misspelt? UNISUM_TIMEOUTS")
    );
    for silent in ["off", "error"] {
        assert_eq!(said(&[misspelt, ("UNISUM_LOG", silent)]).matches("unisum:").count(), 0);
    }
    // What ends something stays.
    let faulty = ("TEST_FAULT", "1");
    for (log, count) in [("warn", 2), ("error", 1), ("off", 0)] {
        let said = said(&[misspelt, faulty, ("UNISUM_LOG", log)]);
        assert_eq!(said.matches("unisum:").count(), count, "{said}");
        assert_eq!(said.contains("unisum: error: it ends here"), count > 0, "{said}");
    }
}

#[test]
fn a_warning_is_said_once_whoever_takes_it() {
    let variables = [("UNISUM_TIMEOUTS", "1"), ("TEST_TAKES_EVENTS", "1")];
    for (variables, by) in [(&variables[..1], "unisum: warning:"), (&variables[..], " WARN ")] {
        let said = said(variables);
        assert_eq!(said.matches("misspelt?").count(), 1, "{said}");
        assert_eq!(said.lines().filter(|line| line.contains(by)).count(), 1, "{said}");
    }
}

/// The body of a rank 0 without a subscriber that waits for a rank, while strangers come.
#[test]
fn plain_rank_0() {
    if std::env::var("TEST_PLAIN").is_err() {
        return;
    }
    let place = std::env::var("UNISUM_RENDEZVOUS").unwrap();
    let place = place.strip_prefix("tcp://").unwrap().to_owned();
    take_events_if_asked();
    let flood = std::thread::spawn(move || {
        let until = Instant::now() + Duration::from_secs(2);
        let mut strangers = 0_u32;
        while Instant::now() < until {
            // Each has a reason of its own to be refused.
            let version = (strangers as u16).max(1000).to_le_bytes();
            if let Ok(mut stream) = std::net::TcpStream::connect(&place) {
                let _ = stream.write_all(&[&b"usmH"[..], &version].concat());
                strangers += 1;
            }
        }
        strangers
    });
    let error = Communicator::from_environment().unwrap_err();
    eprintln!("error: {error}; strangers: {}", flood.join().unwrap());
}

#[test]
fn warnings_of_all_crates_reach_standard_error_and_strangers_do_not_fill_it() {
    let place = format!("tcp://127.0.0.1:{}", support::free_ports(1)[0]);
    let variables = [
        ("TEST_TAKES_EVENTS", "1"),
        ("UNISUM_RANK", "0"),
        ("UNISUM_WORLD", "2"),
        ("UNISUM_RENDEZVOUS", &place),
        ("UNISUM_TOKEN", "aaaaaaaaaaaaaaaaaaaaaaaa"),
        ("UNISUM_CONNECT_TIMEOUT", "3"),
    ];
    let taken = output("plain_rank_0", &variables);
    assert!(taken.contains(" WARN ") && taken.contains("refused a connection"), "{taken}");
    assert!(!taken.contains("unisum: warning:"), "said twice: {taken}");
    let said = output("plain_rank_0", &variables[1..]);
    assert!(said.contains("unisum: warning: the token from UNISUM_TOKEN has at most"), "{said}");
    let refused = "unisum: warning: refused a connection: from 127.0.0.1:";
    assert!(said.contains(refused) && said.contains(", reason protocol version"), "{said}");
    let strangers = said.rsplit_once("strangers: ").unwrap().1.trim().parse::<u32>().unwrap();
    assert!(strangers > 100, "{said}");
    assert!(said.matches(refused).count() <= 20, "ten in 10 s: {said}");
}

#[test]
fn a_process_that_is_alone_though_it_seems_one_of_many_is_warned() {
    for variable in ["SLURM_JOB_ID", "JOB_COMPLETION_INDEX"] {
        let said = said(&[(variable, "0")]);
        assert!(said.contains("warning") && said.contains("alone"), "{variable}: {said}");
        assert!(said.contains("srun") || said.contains("UNISUM_WORLD"), "{variable}: {said}");
    }
}

/// A terminal whose reader has stopped says that there is room as long as there is any.
#[test]
fn no_warning_waits_for_a_terminal_that_has_stopped() {
    World::new(1, "warns_a_terminal").succeed(LIMIT);
}

fn warns_a_terminal() {
    let (mut reader, mut terminal) = (0, 0);
    let (name, settings, size) = (ptr::null_mut(), ptr::null(), ptr::null());
    // SAFETY: the two numbers are valid, and the rest may be null.
    let made = unsafe { libc::openpty(&mut reader, &mut terminal, name, settings, size) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: only numbers. Nobody else writes there.
    assert_eq!(unsafe { libc::dup2(terminal, libc::STDERR_FILENO) }, libc::STDERR_FILENO);
    // The tests' own subscriber does wait.
    tracing::subscriber::with_default(tracing::subscriber::NoSubscriber::new(), || {
        for _ in 0..10 {
            unisum_link::warning!("{}", "a".repeat(3000));
        }
    });
    let mut said = [0; 8];
    // SAFETY: as many bytes as there is room for.
    let read = unsafe { libc::read(reader, said.as_mut_ptr().cast(), said.len()) };
    assert!(read > 0 && said.starts_with(b"unisum"), "{said:?}");
}
