//! Reads manifests by types that were generated from their controllers' CustomResourceDefinitions:
//! for each line of the input, a manifest in JSON, a line with what the types have kept of it, in
//! JSON as well, or `error: ` and what is wrong.

use std::error::Error;
use std::io::{BufRead, stdin};

use kcr_jobset_x_k8s_io::v1alpha2::jobsets::JobSet;
use kcr_leaderworkerset_x_k8s_io::v1::leaderworkersets::LeaderWorkerSet;
use kcr_ray_io::v1::rayjobs::RayJob;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

fn main() -> Result<(), Box<dyn Error>> {
    for line in stdin().lock().lines() {
        match validated(&line?) {
            Ok(kept) => println!("{kept}"),
            Err(error) => println!("error: {}", error.to_string().replace('\n', " ")),
        }
    }
    Ok(())
}

fn validated(manifest: &str) -> Result<String, Box<dyn Error>> {
    let value: Value = serde_json::from_str(manifest)?;
    let word = |name: &str| value[name].as_str().unwrap_or_default();
    match (word("apiVersion"), word("kind")) {
        ("jobset.x-k8s.io/v1alpha2", "JobSet") => kept::<JobSet>(manifest),
        ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet") => kept::<LeaderWorkerSet>(manifest),
        ("ray.io/v1", "RayJob") => kept::<RayJob>(manifest),
        (version, kind) => Err(format!("no definition of {kind} in {version}").into()),
    }
}

fn kept<T: DeserializeOwned + Serialize>(manifest: &str) -> Result<String, Box<dyn Error>> {
    let reader = &mut serde_json::Deserializer::from_str(manifest);
    let read: T = serde_path_to_error::deserialize(reader)?;
    Ok(serde_json::to_string(&read)?)
}
