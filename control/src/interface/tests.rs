use super::*;

fn interface(index: u32, name: &str, up: bool, addresses: &[(&str, u8)]) -> Interface {
    let parsed = |&(ip, prefix): &(&str, u8)| Address { ip: ip.parse().unwrap(), prefix };
    let addresses = addresses.iter().map(parsed).collect();
    let running = up && name != "docker0";
    Interface { name: name.to_owned(), index, up, running, loopback: name == "lo", addresses }
}

fn host() -> Vec<Interface> {
    vec![
        interface(1, "lo", true, &[("127.0.0.1", 8), ("::1", 128)]),
        interface(2, "docker0", true, &[("172.17.0.1", 16)]),
        interface(3, "eth0", true, &[("10.0.0.5", 24), ("2001:db8:1::5", 64), ("fe80::5", 64)]),
        interface(4, "ib0", true, &[("192.168.7.5", 24), ("fe80::5", 64)]),
        interface(5, "eth9", false, &[("10.9.0.5", 24)]),
    ]
}

fn at(text: &str) -> Option<SocketAddr> {
    Some(text.parse().unwrap())
}

/// The routes of `host()`: its own networks, and by default over eth0.
fn route(towards: SocketAddr) -> io::Result<IpAddr> {
    let text = match towards.to_string() {
        t if t.starts_with("127.") => "127.0.0.1",
        t if t.starts_with("192.168.7.") => "192.168.7.5",
        t if t.starts_with("[fe80:") => "fe80::5",
        t if t.starts_with('[') => "2001:db8:1::5",
        _ => "10.0.0.5",
    };
    Ok(text.parse().unwrap())
}

fn no_route(_: SocketAddr) -> io::Result<IpAddr> {
    Err(io::Error::from_raw_os_error(101))
}

fn chosen(filter: &str, towards: Option<SocketAddr>) -> Result<Choice, InterfaceError> {
    let filter = (!filter.is_empty()).then(|| filter.parse().unwrap());
    choose(&host(), filter.as_ref(), towards, route)
}

#[test]
fn the_route_and_the_filter_decide() {
    for (filter, towards, address, name) in [
        ("", at("10.0.0.1:1"), "10.0.0.5", "eth0"),
        ("", at("192.168.7.1:1"), "192.168.7.5", "ib0"),
        ("", at("8.8.8.8:1"), "10.0.0.5", "eth0"),
        ("", at("127.0.0.1:1"), "127.0.0.1", "lo"),
        ("", at("[2001:db8:1::1]:1"), "2001:db8:1::5", "eth0"),
        ("", None, "10.0.0.5", "eth0"),
        ("ib", at("10.0.0.1:1"), "192.168.7.5", "ib0"),
        ("ib,eth", at("10.0.0.1:1"), "10.0.0.5", "eth0"),
        ("ib,eth", at("8.8.8.8:1"), "10.0.0.5", "eth0"),
        ("docker,ib", None, "192.168.7.5", "ib0"),
        ("docker", None, "172.17.0.1", "docker0"),
        ("=ib0,docker0", None, "192.168.7.5", "ib0"),
        ("^docker", None, "10.0.0.5", "eth0"),
        ("^docker,eth", at("10.0.0.1:1"), "192.168.7.5", "ib0"),
        ("^eth0", at("127.0.0.1:1"), "127.0.0.1", "lo"),
        ("lo", None, "127.0.0.1", "lo"),
        ("eth0", at("[2001:db8:1::1]:1"), "2001:db8:1::5", "eth0"),
    ] {
        let choice = chosen(filter, towards).unwrap();
        let found = (choice.address.to_string(), choice.interface.as_str());
        assert_eq!(found, (address.to_owned(), name), "{filter} {towards:?}");
    }
}

#[test]
fn what_cannot_reach_the_rendezvous_is_an_error_that_lists_the_interfaces() {
    for (filter, towards) in [
        ("lo", at("10.0.0.1:1")),
        ("eth9", at("10.9.0.1:1")),
        ("wlan", None),
        ("docker0", at("[2001:db8:1::1]:1")),
    ] {
        let text = chosen(filter, towards).unwrap_err().to_string();
        assert!(text.contains(&format!("`{filter}`")), "{text}");
        assert!(text.contains("eth0 (10.0.0.5, 2001:db8:1::5, fe80::5)"), "{text}");
        assert!(text.contains("eth9 (10.9.0.5, down)"), "{text}");
    }
}

#[test]
fn loopback_never_stands_in_for_a_missing_route() {
    let error = choose(&host(), None, at("10.0.0.1:1"), no_route).unwrap_err();
    assert!(error.to_string().starts_with("no route to 10.0.0.1"), "{error}");
    let through_loopback: Route = |_| Ok(Ipv4Addr::LOCALHOST.into());
    assert!(choose(&host(), None, at("10.0.0.1:1"), through_loopback).is_err());
}

#[test]
fn without_a_default_route_the_first_real_interface_serves() {
    let choice = choose(&host(), None, None, no_route).unwrap();
    assert_eq!((choice.interface.as_str(), choice.address), ("eth0", [10, 0, 0, 5].into()));
    let alone = choose(&host()[..1], None, None, no_route).unwrap();
    assert!(alone.address.is_loopback() && alone.reason.contains("cannot reach"), "{alone:?}");
    let idle = interface(2, "docker0", true, &[("172.17.0.1", 16)]);
    let error = choose(&[idle], None, None, no_route).unwrap_err().to_string();
    assert!(error.starts_with("no network interface of this host is connected"), "{error}");
    assert!(error.contains("docker0 (172.17.0.1)") && !error.contains("198.41"), "{error}");
}

#[test]
fn a_host_without_any_interface_that_is_up_says_that_and_nothing_of_filters_and_routes() {
    let down = [interface(1, "lo", false, &[("127.0.0.1", 8)]), interface(2, "eth0", false, &[])];
    let unaddressed = [interface(1, "lo", true, &[])];
    for host in [&down[..], &unaddressed, &[]] {
        for filter in ["", "=lo", "eth0"] {
            for towards in [None, at("127.0.0.1:1"), at("10.0.0.1:1")] {
                let filter = (!filter.is_empty()).then(|| filter.parse().unwrap());
                let error = choose(host, filter.as_ref(), towards, no_route).unwrap_err();
                let told = error.to_string();
                assert!(told.starts_with("no network interface of this host is up"), "{told}");
                assert!(told.ends_with("ip link set lo up"), "{told}");
            }
        }
    }
}

#[test]
fn link_local_choices_carry_the_scope_of_their_interface() {
    let towards = Some(SocketAddrV6::new("fe80::1".parse().unwrap(), 7, 0, 4).into());
    for filter in ["", "eth0,ib0"] {
        let choice = chosen(filter, towards).unwrap();
        assert_eq!((choice.interface.as_str(), choice.scope_id), ("ib0", 4), "{filter}");
        assert_eq!(choice.socket_address(9).to_string(), "[fe80::5%4]:9");
    }
}

#[test]
fn this_host_chooses_loopback_towards_itself_only() {
    let towards = at("127.0.0.1:9");
    let towards_itself = source_addresses(None, towards).unwrap();
    assert_eq!((towards_itself.len(), towards_itself[0].interface.as_str()), (1, "lo"));
    let anywhere = source_addresses(None, None).unwrap();
    assert!(!anywhere[0].interface.is_empty() && !anywhere[0].reason.is_empty());
}

#[test]
fn networks_compare_by_prefix() {
    let network = |ip: &str, prefix| Address { ip: ip.parse().unwrap(), prefix };
    for (ours, theirs, same) in [
        (network("10.0.0.5", 24), "10.0.0.200", true),
        (network("10.0.0.5", 24), "10.0.1.5", false),
        (network("10.0.0.5", 0), "99.0.0.1", true),
        (network("10.0.0.5", 32), "10.0.0.5", true),
        (network("2001:db8::5", 64), "2001:db8::ffff", true),
        (network("2001:db8::5", 0), "::", true),
        (network("2001:db8::5", 64), "10.0.0.5", false),
    ] {
        assert_eq!(same_network(ours, theirs.parse().unwrap()), same, "{ours:?} {theirs}");
    }
}

fn told(filter: &str, towards: Option<SocketAddr>, host: &[Interface]) -> Vec<String> {
    let filter = (!filter.is_empty()).then(|| filter.parse().unwrap());
    let best = choose(host, filter.as_ref(), towards, route).unwrap();
    let choices = with_others(host, filter.as_ref(), best);
    choices.iter().map(|choice| choice.address.to_string()).collect()
}

#[test]
fn all_addresses_that_may_serve_are_told_the_routed_one_first() {
    let all = ["10.0.0.5", "2001:db8:1::5", "192.168.7.5", "fe80::5", "172.17.0.1"];
    assert_eq!(told("", None, &host()), all);
    assert_eq!(told("", at("10.0.0.1:1"), &host()), all);
    let [eth, eth6, ib, link_local, idle] = all;
    assert_eq!(told("", at("192.168.7.1:1"), &host()), [ib, eth, eth6, link_local, idle]);
    assert_eq!(told("", at("[2001:db8:1::1]:1"), &host()), [eth6, eth, ib, link_local, idle]);
    assert_eq!(told("^eth,docker", at("10.0.0.1:1"), &host()), [ib, link_local]);
    assert_eq!(told("ib,eth", at("192.168.7.1:1"), &host()), [ib, eth, eth6, link_local]);
    assert_eq!(told("", at("127.0.0.1:1"), &host()), ["127.0.0.1"]);
    // Last an interface without anything behind it, or without it yet.
    assert_eq!(told("=docker0", None, &host()), ["172.17.0.1"]);
}

#[test]
fn of_many_addresses_some_are_told() {
    let mut host = host();
    let ips: Vec<String> = (1..60).map(|n| format!("10.8.{n}.1")).collect();
    let ips: Vec<(&str, u8)> = ips.iter().map(|ip| (ip.as_str(), 24)).collect();
    host.push(interface(9, "eth8", true, &ips));
    let told = told("", None, &host);
    assert_eq!((told.len(), told[0].as_str()), (ADDRESSES_MAX, "10.0.0.5"));
}

#[test]
fn others_are_dialled_over_this_hosts_interfaces_and_never_at_its_own_addresses() {
    let to = |filter: &str, told: &[&str], is_here| {
        let filter = (!filter.is_empty()).then(|| filter.parse().unwrap());
        let told: Vec<SocketAddr> = told.iter().map(|told| told.parse().unwrap()).collect();
        let paths = Paths::of(&host(), filter.as_ref()).to(&told, is_here);
        paths.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let told = ["172.17.0.1:5", "10.0.0.6:5", "[fe80::6]:5"];
    let elsewhere = ["10.0.0.6:5", "[fe80::6%3]:5", "[fe80::6%4]:5"];
    assert_eq!(to("", &told, false), elsewhere);
    assert_eq!(to("=ib0", &told, false), ["10.0.0.6:5", "[fe80::6%4]:5"]);
    assert_eq!(to("", &told, true), [&["172.17.0.1:5"], &elsewhere[..]].concat());
    // Who told nothing else may still be behind a proxy.
    assert_eq!(to("", &["172.17.0.1:5"], false), ["172.17.0.1:5"]);
}

#[test]
fn of_two_interfaces_in_one_network_the_one_that_does_not_send_is_told() {
    let mut host = host();
    host.push(interface(6, "eth1", true, &[("10.0.0.6", 24)]));
    let caution = |filter: &str, towards: Option<SocketAddr>| {
        choose(&host, Some(&filter.parse().unwrap()), towards, route).unwrap().caution
    };
    let told = caution("=eth1", at("10.0.0.1:1")).unwrap();
    assert!(told.starts_with("eth1 (10.0.0.6) and eth0 (10.0.0.5) are in one network"), "{told}");
    for (filter, towards) in
        [("=eth0", "10.0.0.1:1"), ("=ib0", "10.0.0.1:1"), ("lo", "127.0.0.1:1")]
    {
        assert_eq!(caution(filter, at(towards)), None, "{filter}");
    }
}
