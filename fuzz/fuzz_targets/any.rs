//! Runs the fuzz target that `FUZZ_TARGET` names; where it names none, lists them. With
//! `FUZZ_SEEDS` it writes the target's seeds to that directory first.

#![no_main]

use std::sync::OnceLock;
use std::{env, fs, process};

use libfuzzer_sys::fuzz_target;
use unisum_link::fuzzing::Target;

static TARGET: OnceLock<Target> = OnceLock::new();

fuzz_target!(
    init: {
        let target = chosen();
        if let Some(directory) = env::var_os("FUZZ_SEEDS") {
            for (number, seed) in (target.seeds)().iter().enumerate() {
                let path = std::path::Path::new(&directory).join(format!("seed-{number}"));
                fs::write(path, seed).expect("the directory of FUZZ_SEEDS can be written");
            }
        }
        TARGET.get_or_init(|| target);
    },
    |bytes: &[u8]| (TARGET.get().expect("it is chosen first").check)(bytes)
);

fn chosen() -> Target {
    let all = [
        unisum_link::fuzzing::targets(),
        unisum_shm::fuzzing::TARGETS.to_vec(),
        unisum_tcp::fuzzing::TARGETS.to_vec(),
        unisum_verbs::fuzzing::TARGETS.to_vec(),
        unisum::fuzzing::targets(),
    ]
    .concat();
    let name = env::var("FUZZ_TARGET").unwrap_or_default();
    all.iter().copied().find(|target| target.name == name).unwrap_or_else(|| {
        all.iter().for_each(|target| println!("{}", target.name));
        process::exit(if name.is_empty() { 0 } else { 2 })
    })
}
