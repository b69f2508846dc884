//! Both ends of an encrypted connection.

use std::io;

use unisum_link::handshake::{Build, Heard, Hello, Purpose, Secret};
use unisum_link::secure::{Credentials, Listening, Sealing, Session, dial};

/// The keys of a connection's two ends, the dialer's first, after a handshake in memory.
pub(crate) fn sessions() -> [Box<Session>; 2] {
    struct Wire(Listening, Credentials, Vec<u8>);
    impl io::Write for Wire {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match self.0.feed(bytes, &self.1, |_| Ok(())) {
                Heard::More => {}
                Heard::Send(send) | Heard::Admitted(_, send) => self.2.extend(send),
                Heard::Refused(refusal, _) => panic!("{refusal}"),
            }
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    impl io::Read for Wire {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            let read = (&self.2[..]).read(bytes)?;
            self.2.drain(..read);
            Ok(read)
        }
    }
    let secret = Secret::new(b"the token of these tests");
    let credentials = Credentials::token(secret, Sealing::Everywhere).expect("TLS can be had");
    let (purpose, session, job) = (Purpose::Data, [1; 16], [2; 16]);
    let build = Build::default();
    let hello = Hello { purpose, socket: 0, from: 1, to: 0, world: 2, session, job, build };
    let mut wire = Wire(Listening::new([5; 32], true), credentials.clone(), Vec::new());
    let dialer = dial(&mut wire, &hello, &credentials, true);
    let dialer = dialer.expect("both know the token").expect("it is encrypted");
    [dialer, wire.0.take_session().expect("it is encrypted")]
}
