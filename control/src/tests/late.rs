//! Ranks that come once the job has begun without them.

use super::*;

/// Why this rank may not come in.
pub(super) fn refusal(rendezvous: &Rendezvous, hello: &Hello, token: &str) -> String {
    let Rendezvous::Tcp { port, .. } = rendezvous else { panic!("a TCP rendezvous") };
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).unwrap();
    let credentials = with_token(token.as_bytes());
    secure::dial(&mut stream, hello, &credentials, true).unwrap_err().to_string()
}

#[test]
fn who_comes_too_late_is_told_what_has_become_of_the_job() {
    let (mut controls, rendezvous) = start(4, &[2]);
    let by_hand = join_by_hand(2, 4, &rendezvous);
    let told_in_the_end = |rank: u32, expected: &str| {
        let until = Instant::now() + PATIENCE;
        loop {
            let told = refusal(&rendezvous, &hello(rank, 4), "the token of these tests");
            if told.contains(expected) {
                break;
            }
            assert!(Instant::now() < until, "{told}");
        }
    };
    told_in_the_end(3, "rank 3 is taken: process");
    drop(controls.pop());
    told_in_the_end(
        3,
        "rank 3 comes too late: the job has started, and whoever was this rank has left it",
    );
    told_in_the_end(1, "rank 1 is taken: process");
    drop(by_hand);
    for rank in 1..4 {
        told_in_the_end(rank, &format!("rank {rank} comes too late: the job has ended"));
    }
}
