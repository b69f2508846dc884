//! What a rank's control thread does for its link.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use unisum_link::fork::ParentOnly;
use unisum_link::handshake::{Heard, Hello, Refusal, random};
use unisum_link::secure::{Credentials, Listening, Proven, Session};
use unisum_tcp::Inbox;

/// What the control thread does in a job: accepts, checks the token, delivers. The thread is left
/// behind if a case opens fewer connections than it could.
pub(crate) fn accept(
    listener: TcpListener,
    inbox: Arc<Inbox>,
    credentials: Credentials,
    expected: usize,
) {
    accept_while(listener, inbox, credentials, expected, || true);
}

/// The same, but who comes when the rank is no longer there is refused.
pub(crate) fn accept_while(
    listener: TcpListener,
    inbox: Arc<Inbox>,
    credentials: Credentials,
    expected: usize,
    is_there: impl Fn() -> bool + Send + 'static,
) {
    thread::spawn(move || {
        for _ in 0..expected {
            let (mut stream, _) = listener.accept().unwrap();
            let admitted = admit(&mut stream, &credentials, is_there());
            let Some((hello, session)) = admitted else { continue };
            let stream = ParentOnly::new(stream);
            inbox.deliver(hello.from as usize, hello.socket, Proven::new(stream, session));
        }
    });
}

/// Hears a dialer; `None` if it breaks off or is refused.
fn admit(
    stream: &mut TcpStream,
    credentials: &Credentials,
    is_there: bool,
) -> Option<(Hello, Option<Box<Session>>)> {
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    let mut listening = Listening::new(random().ok()?, true);
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        let let_in = |_: &Hello| if is_there { Ok(()) } else { Err(Refusal::Session) };
        match listening.feed(&byte, credentials, let_in) {
            Heard::More => {}
            Heard::Send(bytes) => stream.write_all(&bytes).ok()?,
            Heard::Admitted(hello, bytes) => {
                stream.write_all(&bytes).ok()?;
                return Some((hello, listening.take_session()));
            }
            Heard::Refused(_, bytes) => {
                let _ = stream.write_all(&bytes);
                return None;
            }
        }
    }
}
