//! What must hold of groups, whatever ranks say which ones they want.

use unisum_link::fuzzing::Target;

use super::{Making, SplitRequest, divide};

pub(crate) const TARGETS: &[Target] =
    &[Target { name: "split_requests", check: check_requests, seeds: request_seeds }];

/// Requests that are accepted encode to the bytes that they were read from; with them all ranks
/// find themselves in groups that none is in twice, under numbers that nobody has yet.
fn check_requests(bytes: &[u8]) {
    let mut requests = Vec::new();
    for blob in bytes.chunks(24 + 8 * usize::from(bytes.first().map_or(1, |it| it % 4))) {
        let Some(request) = SplitRequest::decode(blob) else { return };
        assert_eq!(request.encode(), blob);
        // What it is called goes into messages of errors.
        assert!(!request.making.to_string().is_empty());
        requests.push(request);
    }
    let Some((_, next)) = divide(&requests, 0) else { return };
    for rank in 0..requests.len() {
        let (group, same) = divide(&requests, rank).expect("it was possible for another rank");
        assert_eq!(same, next);
        assert_eq!(group.is_some(), requests[rank].color.is_some());
        let Some(group) = group else { continue };
        assert!(group.communicator < next && group.ranks.contains(&rank));
        let is_alike = |&other: &usize| {
            let (theirs, _) = divide(&requests, other).expect("it was possible for this rank");
            theirs
                .is_some_and(|it| it.ranks == group.ranks && it.communicator == group.communicator)
        };
        assert!(group.ranks.iter().all(is_alike));
        assert!(requests.iter().all(|it| it.next_communicator <= group.communicator));
    }
}

fn request_seeds() -> Vec<Vec<u8>> {
    let request =
        |making, color, key| SplitRequest { making, color, key, next_communicator: 3 }.encode();
    let split = [(Some(1), 4), (None, 0), (Some(1), -4), (Some(8), 0)];
    vec![
        // A color is the first byte, and so says how long a request is.
        split.map(|(color, key)| request(Making::Split, color, key)).concat(),
        request(Making::Subset(vec![0, 2]), Some(2), 1),
        request(Making::Mesh { rows: 2, columns: 3 }, Some(3), 1),
    ]
}
