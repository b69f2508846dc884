//! What must hold of interface filters and of what the kernel says about interfaces.

use unisum_link::fuzzing::Target;

use super::InterfaceFilter;
use super::netlink::{Found, read_reply};

pub(crate) const TARGETS: &[Target] = &[
    Target { name: "interface_filter", check: check_filter, seeds: filter_seeds },
    Target { name: "netlink", check: check_netlink, seeds: netlink_seeds },
];

/// A filter that is accepted prints as the same filter, and one that excludes allows exactly what
/// the one that does not refuses.
fn check_filter(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(exact) = InterfaceFilter::exact(&text) {
        assert_eq!(exact.to_string().parse(), Ok(exact));
    }
    let Ok(filter) = text.parse::<InterfaceFilter>() else { return };
    let printed = filter.to_string();
    assert_eq!(printed.parse().as_ref(), Ok(&filter));
    let negated = printed.strip_prefix('^').map_or_else(|| format!("^{printed}"), str::to_owned);
    let negated: InterfaceFilter = negated.parse().expect("the list is the same");
    let names = printed.split(['^', '=', ',']).filter(|name| !name.is_empty());
    for name in names.chain(["eth0", "lo"]) {
        assert_ne!(filter.allows(name), negated.allows(name));
    }
}

fn filter_seeds() -> Vec<Vec<u8>> {
    ["eth,ib", "=eth0,eth1", "^docker,lo", "^=eth0"].map(Vec::from).to_vec()
}

/// A reply yields no more interfaces and addresses than it has messages.
fn check_netlink(bytes: &[u8]) {
    let mut found = Found::new();
    let _ = read_reply(bytes, &mut found);
    let addresses: usize = found.values().map(|interface| interface.addresses.len()).sum();
    assert!(found.len() + addresses <= bytes.len() / MESSAGE_BYTES_MIN);
}

/// `lo`, 127.0.0.1/8, and the end.
fn netlink_seeds() -> Vec<Vec<u8>> {
    let header = |length: u32, kind: u16| {
        [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10]].concat()
    };
    let link = [&[0; 4][..], &1_u32.to_ne_bytes(), &9_u32.to_ne_bytes(), &[0; 4]].concat();
    let name = [&7_u16.to_ne_bytes()[..], &3_u16.to_ne_bytes(), b"lo\0\0"].concat();
    let address = [&[2, 8, 0, 0][..], &1_u32.to_ne_bytes()].concat();
    let local = [&8_u16.to_ne_bytes()[..], &2_u16.to_ne_bytes(), &[127, 0, 0, 1]].concat();
    let messages = [header(40, 16), link, name, header(32, 20), address, local, header(16, 3)];
    vec![messages.concat()]
}

/// A header and the shortest body that says anything.
const MESSAGE_BYTES_MIN: usize = 16 + 8;
