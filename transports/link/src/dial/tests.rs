use std::net::TcpListener;

use super::*;

/// Nothing answers there: the backlog of its listener is full.
struct Silent {
    address: SocketAddr,
    listener: Socket,
    crowd: Vec<Socket>,
}

impl Silent {
    fn new() -> Self {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        listener.bind(&any.into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        let crowd = (0..4).map(|_| begin(address, &|_, _| {}).unwrap()).collect();
        Self { address, listener, crowd }
    }
}

fn refusing() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn met(stream: TcpStream, _: SocketAddr) -> Result<SocketAddr, String> {
    Ok(stream.peer_addr().unwrap())
}

#[test]
fn the_address_that_works_is_found_wherever_it_stands() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (silent, works) = (Silent::new(), listener.local_addr().unwrap());
    // No route leads to a documentation address's scope that does not exist.
    let nowhere: SocketAddr = "[fe80::1%4000000]:9".parse().unwrap();
    for place in 0..4 {
        let mut addresses = vec![silent.address, refusing(), nowhere];
        addresses.insert(place, works);
        assert_eq!(dial(&addresses, soon(), |_, _| {}, met).unwrap(), works);
    }
}

#[test]
fn who_is_not_the_one_is_left_for_the_next() {
    let strangers = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let works = listener.local_addr().unwrap();
    let mut addresses: Vec<_> = strangers.iter().map(|it| it.local_addr().unwrap()).collect();
    addresses.push(works);
    let meet = |_, address| if address == works { Ok(address) } else { Err("a stranger") };
    assert_eq!(dial(&addresses, soon(), |_, _| {}, meet).unwrap(), works);
}

#[test]
fn all_that_was_tried_is_told() {
    let (silent, refusing) = (Silent::new(), refusing());
    let stranger = TcpListener::bind("127.0.0.1:0").unwrap();
    let addresses = [silent.address, refusing, stranger.local_addr().unwrap()];
    let until = Instant::now() + Duration::from_secs(3);
    let unreached = dial(&addresses, until, |_, _| {}, |_, _| Err::<(), _>("a stranger"));
    let text = unreached.unwrap_err().to_string();
    for (address, why) in addresses.iter().zip(["no answer", "refused", "a stranger"]) {
        let part = text.split(", ").find(|part| part.starts_with(&address.to_string()));
        assert!(part.is_some_and(|part| part.contains(why)), "{text}");
    }
    assert!(Instant::now() >= until, "the silent one had its time");
    let none = dial(&[], soon(), |_, _| {}, met).unwrap_err();
    assert_eq!(none.to_string(), "no address");
}

/// The kernel alone would try again a second after its first attempt, and then after two more.
#[test]
fn who_dials_again_is_let_in_soon_after_an_address_answers() {
    let soon_enough = (0..20).any(|_| {
        let silent = Silent::new();
        let address = silent.address;
        let dialled = std::thread::spawn(move || {
            redial(&[address], soon(), |_, _| {}, met).map(|_| Instant::now())
        });
        std::thread::sleep(Duration::from_millis(300));
        // Who dials may have connected and not be done yet: then nobody comes any more.
        silent.listener.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        let listener = TcpListener::from(silent.listener);
        drop(silent.crowd);
        let back = Instant::now();
        while !dialled.is_finished() {
            let _ = listener.accept();
        }
        dialled.join().unwrap().unwrap() - back < Duration::from_millis(400)
    });
    assert!(soon_enough);
}

#[test]
fn who_dials_again_takes_a_refusal_for_an_answer() {
    let start = Instant::now();
    let unreached = redial(&[refusing()], soon(), |_, _| {}, met).unwrap_err();
    let [(_, Failure::Connect(error))] = &unreached.tried[..] else { panic!("{unreached}") };
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn who_dials_again_waits_for_a_network_that_is_away() {
    let nowhere: SocketAddr = "[fe80::1%4000000]:9".parse().unwrap();
    let (silent, time) = (Silent::new(), Duration::from_millis(700));
    let until = Instant::now() + time;
    let unreached = redial(&[nowhere, silent.address], until, |_, _| {}, met).unwrap_err();
    assert!(Instant::now() >= until);
    assert_eq!(unreached.tried.len(), 2, "each is told once: {unreached}");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let works = listener.local_addr().unwrap();
    assert_eq!(redial(&[nowhere, works], soon(), |_, _| {}, met).unwrap(), works);
}

#[test]
fn few_attempts_are_under_way_at_a_time() {
    let silent = Silent::new();
    let (under_way, open, tried) = (Vec::new(), Vec::new(), Vec::new());
    let mut attempts: Attempts<()> = Attempts { repeats: true, under_way, open, tried };
    let start = Instant::now();
    attempts.begin(silent.address, &|_, _| {}, start);
    for round in 1..=100 {
        let now = start + 2 * AGAIN * round;
        attempts.repeat(&|_, _| {}, now);
        let since: Vec<_> = attempts.under_way.iter().map(|it| now - it.2).collect();
        assert!(since.len() <= 1 + BESIDE, "{since:?}");
        assert!(since[0] < ATTEMPT_MAX && since.last().unwrap().is_zero(), "{since:?}");
    }
}
