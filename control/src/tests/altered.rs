//! Bytes on control connections that the other end has not sealed.

use super::*;

/// Hears messages until one is taken.
fn hear<T>(connection: &mut Proven, take: impl Fn(Message) -> Option<T>) -> T {
    let mut heard = BytesMut::new();
    loop {
        while let Some(message) = Message::decode(&mut heard).unwrap() {
            if let Some(taken) = take(message) {
                return taken;
            }
        }
        let mut byte = [0];
        connection.read_exact(&mut byte).expect("it comes before the end");
        heard.extend(byte);
    }
}

/// Nothing is heard of bytes that are inserted on the way. All are told so, the rank at the other
/// end as well.
#[test]
fn bytes_that_the_member_has_not_sealed_end_the_job_as_such() {
    let (controls, rendezvous) = start(3, &[2]);
    let mut broken = join_by_hand(2, 3, &rendezvous);
    let mut forged = BytesMut::new();
    Message::Joined.encode(&mut forged);
    let mut record = (forged.len() as u32).to_le_bytes().to_vec();
    record.extend(forged.iter().chain(&[0; 16]));
    broken.stream.write_all(&record).unwrap();
    expect_verdict(&controls, PATIENCE, VerdictKind::Protocol, &[2]);
    let text = controls[1].verdict().unwrap().text;
    let begins = "rank 0 reports: control connection to rank 2: what came after byte";
    assert!(text.starts_with(begins), "{text}");
    assert!(text.contains("was altered on its way"), "{text}");
    let told = hear(&mut broken, |message| match message {
        Message::Verdict(verdict) => Some(verdict.text),
        _ => None,
    });
    assert_eq!(told, text);
}

/// Nor of what somebody inserts in the coordinator's words: it hears so from the member, whose
/// process it would take for dead.
#[test]
fn bytes_that_the_coordinator_has_not_sealed_end_the_job_as_such() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let rendezvous = at(listener.local_addr().unwrap().port());
    let start = thread::spawn(|| Control::start(config(1, 2, rendezvous)).unwrap());
    let mut connection = admit_by_hand(&listener);
    let control = start.join().unwrap();
    connection.stream.write_all(&[&10_u32.to_le_bytes()[..], &[7; 26]].concat()).unwrap();
    expect_verdict(std::slice::from_ref(&control), PATIENCE, VerdictKind::Protocol, &[0]);
    let text = control.verdict().unwrap().text;
    let begins = "rank 1 reports: control connection to rank 0: what came after byte";
    assert!(text.starts_with(begins), "{text}");
    let told = hear(&mut connection, |message| match message {
        Message::Concluded(verdict) => Some(verdict.text),
        _ => None,
    });
    assert_eq!(told, text);
}
