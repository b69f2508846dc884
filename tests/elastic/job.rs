//! An elastic training whose ranks are killed from outside and replaced by newcomers.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::member::{self, now_ns};
use super::support::{Random, Running, World};
use super::watch::Watch;

/// Nothing takes longer that does not hang.
const LIMIT: Duration = Duration::from_secs(20);

/// Runs a process's command on one of the hosts, by its number.
pub(crate) type Through = fn(usize) -> Vec<String>;

/// What a job is to be.
#[derive(Clone)]
pub(crate) struct Shape {
    pub(crate) name: String,
    pub(crate) ranks: usize,
    pub(crate) through: Through,
    pub(crate) variables: Vec<(&'static str, String)>,
}

pub(crate) struct Job {
    shape: Shape,
    world: World,
    running: Running,
    directory: PathBuf,
    pub(crate) watch: Watch,
    looked: Instant,
}

/// A kill, or two at once.
#[derive(Clone, Debug)]
pub(crate) struct Kill {
    pub(crate) victims: Vec<usize>,
    pub(crate) when: u64,
    /// From the death of the last victim until the last survivor had ended a step without them.
    pub(crate) stall_ns: u64,
    /// When the newcomers had taken the first step with all others.
    pub(crate) settled: u64,
}

impl Job {
    pub(crate) fn start(shape: Shape) -> Self {
        let name = format!("unisum-elastic-{}-{}", std::process::id(), shape.name);
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory).unwrap();
        let (through, logs) = (shape.through, directory.clone());
        let mut world = World::new(shape.ranks, "train")
            .set("UNISUM_REPRODUCIBLE", 1)
            .set("ELASTIC", "yes")
            .set(member::DIRECTORY, directory.display())
            .through(move |number| {
                let log = logs.join(format!("{number}.log")).display().to_string();
                let to_file = ["sh", "-c", "exec \"$@\" 2>\"$0\"", &log].map(str::to_owned);
                through(number).into_iter().chain(to_file).collect()
            });
        for (name, value) in &shape.variables {
            world = world.set(name, value);
        }
        let running = world.start();
        let mut watch = Watch::default();
        (0..shape.ranks).for_each(|it| watch.add(&directory, running.pid(it)));
        let looked = Instant::now();
        let mut job = Self { shape, world, running, directory, watch, looked };
        job.await_all(0);
        job
    }

    /// One more process, which joins; its number.
    pub(crate) fn add_newcomer(&mut self) -> usize {
        let number = self.watch.processes.len();
        let newcomer = self.world.clone().running("newcomer");
        let newcomer = newcomer.set("UNISUM_RANK", "").set("UNISUM_WORLD", "");
        self.running.add(&newcomer, number);
        self.watch.add(&self.directory, self.running.pid(number));
        number
    }

    /// Reads what there is to read; a fault ends the test, with what led to it.
    pub(crate) fn look(&mut self) {
        let mut seen = self.watch.read();
        // Asking the system takes longer.
        if seen.is_ok() && self.looked.elapsed() > Duration::from_millis(50) {
            self.looked = Instant::now();
            let is_gone =
                |it: &usize| !self.running.lives(*it) && !self.watch.processes[*it].is_over;
            let gone: Vec<usize> = self.watch.living().filter(is_gone).collect();
            if !gone.is_empty() {
                seen = Err(format!("processes {gone:?} have ended, and nobody killed them"));
            }
        }
        if let Err(why) = seen {
            self.fail(&why);
        }
    }

    /// Looks on until `is_so`.
    fn look_until(&mut self, what: &str, is_so: impl Fn(&Watch) -> bool) {
        let deadline = Instant::now() + LIMIT;
        loop {
            self.look();
            if is_so(&self.watch) {
                return;
            }
            if Instant::now() > deadline {
                self.fail(&format!("a hang: not within {LIMIT:?}: {what}"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Looks on for so long.
    pub(crate) fn look_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.look();
            let left = end.saturating_duration_since(Instant::now());
            std::thread::sleep(left.min(Duration::from_millis(5)));
        }
    }

    /// Waits until all that are alive have ended a step after `time`, all in the newest view, which
    /// has no others.
    pub(crate) fn await_all(&mut self, time: u64) {
        self.look_until("all that are alive step in one view", |watch| {
            let (epoch, members) = watch.view();
            let living = watch.living().map(|it| &watch.processes[it]);
            let mut steps = living.map(|it| it.stepped > time && it.epoch == epoch);
            steps.all(|it| it) && watch.living().count() == members.len()
        });
    }

    /// The members of the newest view that are alive, by rank.
    pub(crate) fn members(&self) -> Vec<usize> {
        let (_, members) = self.watch.view();
        let process = |number: &u64| {
            let mut living = self.watch.living();
            living.find(|it| self.watch.processes[*it].number == Some(*number))
        };
        members.iter().filter_map(process).collect()
    }

    /// Kills these, so far apart, and returns at once.
    pub(crate) fn kill(&mut self, victims: &[usize], apart: Duration) -> Kill {
        let when = now_ns();
        for (index, &victim) in victims.iter().enumerate() {
            if index > 0 && !apart.is_zero() {
                self.look_for(apart);
            }
            self.watch.processes[victim].killed = Some(now_ns());
            self.running.signal(victim, libc::SIGKILL);
        }
        Kill { victims: victims.to_vec(), when, stall_ns: 0, settled: when }
    }

    /// From now on these are as good as dead, whatever they do, as those on a host that is cut off.
    pub(crate) fn give_up(&mut self, victims: &[usize]) -> Kill {
        let when = now_ns();
        victims.iter().for_each(|it| self.watch.processes[*it].killed = Some(when));
        Kill { victims: victims.to_vec(), when, stall_ns: 0, settled: when }
    }

    /// Waits until those have ended that were given up: by themselves, or because they are killed.
    pub(crate) fn bury(&mut self, victims: &[usize], are_killed: bool) {
        if are_killed {
            victims.iter().for_each(|it| self.running.signal(*it, libc::SIGKILL));
        }
        let deadline = Instant::now() + LIMIT;
        while let Some(victim) = victims.iter().find(|it| self.running.lives(**it)) {
            self.look();
            if Instant::now() > deadline {
                self.fail(&format!("process {victim}, which was cut off, does not end"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops a process, or has it go on.
    pub(crate) fn stop(&self, process: usize, stops: bool) {
        if self.watch.processes[process].killed.is_none() {
            self.running.signal(process, if stops { libc::SIGSTOP } else { libc::SIGCONT });
        }
    }

    /// Waits until all that were members go on without the victims; how long that took.
    pub(crate) fn await_survivors(&mut self, kill: &mut Kill) {
        let survivors = self.members();
        let dead: Vec<u64> =
            kill.victims.iter().filter_map(|it| self.watch.processes[*it].number).collect();
        self.look_until("the survivors take a step without the victims", |watch| {
            survivors.iter().all(|it| {
                watch.processes[*it].killed.is_some() || {
                    let process = &watch.processes[*it];
                    let view = &watch.views.get(&process.epoch);
                    let is_without = |it: &Vec<u64>| dead.iter().all(|dead| !it.contains(dead));
                    process.stepped > kill.when && view.is_some_and(is_without)
                }
            })
        });
        let passages = self.watch.passages.iter().rev();
        let recent = passages.take_while(|it| it.ended > kill.when);
        let without = recent.filter(|it| {
            let view = &self.watch.views[&it.epoch];
            survivors.contains(&it.process) && dead.iter().all(|dead| !view.contains(dead))
        });
        // The first step of each that is in such a view.
        let mut firsts = std::collections::BTreeMap::new();
        without.for_each(|it| _ = firsts.insert(it.process, it.ended));
        // What passed between two deaths is drawn, and no stall.
        let deaths = kill.victims.iter().filter_map(|it| self.watch.processes[*it].killed);
        let last = deaths.max().unwrap_or(kill.when);
        kill.stall_ns = firsts.values().max().map_or(0, |ended| ended - last);
    }

    /// Waits until all that are alive have ended a step after `time`; how much later the last one
    /// did.
    pub(crate) fn await_steps(&mut self, time: u64) -> u64 {
        let living = self.watch.living().map(|it| (it, self.watch.processes[it].step));
        let before: Vec<(usize, u64)> = living.collect();
        self.look_until("all go on", |watch| {
            before.iter().all(|&(process, before)| {
                let process = &watch.processes[process];
                process.stepped > time && process.step > before
            })
        });
        let firsts = before.iter().map(|(it, _)| self.watch.processes[*it].first_after(time));
        firsts.max().map_or(0, |it| it.saturating_sub(time))
    }

    /// Ends the training in order.
    pub(crate) fn finish(mut self) -> Watch {
        std::fs::create_dir(self.directory.join(member::END)).unwrap();
        self.look_until("the training ends", |watch| {
            watch.living().all(|it| watch.processes[it].is_over)
        });
        let living: Vec<usize> = self.watch.living().collect();
        let ended = self.running.wait(LIMIT);
        for process in living {
            assert_eq!(ended[process].status, 0, "process {process}: {:#?}", ended[process]);
        }
        if std::env::var_os("UNISUM_TEST_KEEP").is_none() {
            std::fs::remove_dir_all(&self.directory).unwrap();
        }
        self.watch
    }

    fn fail(&mut self, why: &str) -> ! {
        println!("{}: {why}", self.shape.name);
        println!("the newest view: {:?}", self.watch.view());
        let recent = self.watch.processes.len().saturating_sub(3 * self.shape.ranks);
        for (number, process) in self.watch.processes.iter().enumerate() {
            let is_recent = number >= recent;
            if process.killed.is_some() && !is_recent {
                continue;
            }
            let killed = process.killed;
            let (pid, id) = (self.running.pid(number), process.number);
            println!("process {number}, pid {pid}, number {id:?}, killed {killed:?}:");
            let first = process.lines.len().saturating_sub(12);
            process.lines[first..].iter().for_each(|line| println!("    {line}"));
            let log = self.directory.join(format!("{number}.log"));
            let log = std::fs::read_to_string(log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let first = lines.len().saturating_sub(12);
            lines[first..].iter().for_each(|line| println!("    | {line}"));
        }
        // A command that looks at the processes, by their ids.
        if let Ok(command) = std::env::var("UNISUM_TEST_ON_FAULT") {
            let living = self.watch.living().map(|it| self.running.pid(it).to_string());
            let _ = std::process::Command::new(command).args(living).status();
        }
        panic!("{}: {why}; journals in {}", self.shape.name, self.directory.display());
    }
}

/// Whom to kill next: rank 0 no less often than others, two at once in one of so many cases.
pub(crate) fn draw_victims(random: &mut Random, members: &[usize], two_in: usize) -> Vec<usize> {
    let rank = if random.below(4) == 0 { 0 } else { random.below(members.len()) };
    let mut victims = vec![members[rank]];
    // Of four ranks that lose two, those with rank 0 go on: here it may be lost.
    if random.below(two_in) == 0 && members.len() > 4 {
        victims.push(members[(rank + 1 + random.below(members.len() - 1)) % members.len()]);
    }
    victims
}
