//! The network interfaces of this host, asked of the kernel over rtnetlink.
//!
//! This is what `getifaddrs` does inside libc; asking directly needs no unsafe code and no `/proc`.
//!
//! Source: rtnetlink(7), netlink(7); numbers from `linux/netlink.h`, `rtnetlink.h`, `if_link.h`,
//! `if_addr.h` (kernel ABI).

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// One network interface and the addresses a socket can be bound to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) index: u32,
    pub(super) up: bool,
    /// Whether something is at its other end, as far as the driver knows: a carrier, for a bridge
    /// an interface in it that has one.
    pub(super) running: bool,
    pub(super) loopback: bool,
    pub(super) addresses: Vec<Address>,
}

/// An address of an interface with the length of its network prefix in bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) ip: IpAddr,
    pub(super) prefix: u8,
}

/// All interfaces of this network namespace in the order of their indices.
///
/// Blocks only for two questions to the kernel, which answers without waiting for anything.
pub(super) fn interfaces() -> io::Result<Vec<Interface>> {
    let mut found = BTreeMap::new();
    dump(RTM_GETLINK, &mut found)?;
    dump(RTM_GETADDR, &mut found)?;
    Ok(found.into_values().collect())
}

pub(super) type Found = BTreeMap<u32, Interface>;

fn dump(question: u16, found: &mut Found) -> io::Result<()> {
    let kind = (SocketType::RAW, SocketFlags::CLOEXEC);
    // No protocol: NETLINK_ROUTE is number 0.
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, kind.0, kind.1, None)?;
    rustix::net::send(&socket, &request(question), SendFlags::empty())?;
    let mut buffer = vec![0; REPLY_BYTES];
    loop {
        let (_, bytes) = rustix::io::retry_on_intr(|| {
            rustix::net::recv(&socket, &mut buffer[..], RecvFlags::TRUNC)
        })?;
        let reply = buffer.get(..bytes).ok_or_else(|| malformed("reply longer than the buffer"))?;
        if read_reply(reply, found)? == Progress::Done {
            return Ok(());
        }
    }
}

/// A dump request: the message header and an all-zero body, which means "all of every family".
fn request(question: u16) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[0..4].copy_from_slice(&(REQUEST_BYTES as u32).to_ne_bytes());
    bytes[4..6].copy_from_slice(&question.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    More,
    Done,
}

pub(super) fn read_reply(mut reply: &[u8], found: &mut Found) -> io::Result<Progress> {
    if reply.is_empty() {
        return Err(malformed("empty reply"));
    }
    while !reply.is_empty() {
        let length = u32_at(reply, 0)? as usize;
        let kind = u16_at(reply, 4)?;
        let body = reply.get(HEADER_BYTES..length).ok_or_else(|| malformed("message cut short"))?;
        match kind {
            NLMSG_DONE => return Ok(Progress::Done),
            NLMSG_ERROR => return Err(refusal(body)?),
            RTM_NEWLINK => read_link(body, found)?,
            RTM_NEWADDR => read_address(body, found)?,
            _ => {}
        }
        reply = reply.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(Progress::More)
}

fn refusal(body: &[u8]) -> io::Result<io::Error> {
    let code = i32::from_ne_bytes(array_at(body, 0)?);
    Ok(io::Error::from_raw_os_error(code.saturating_neg()))
}

/// `struct ifinfomsg`: family u8, pad u8, type u16, index i32, flags u32, change u32; then
/// attributes.
fn read_link(body: &[u8], found: &mut Found) -> io::Result<()> {
    let index = u32_at(body, 4)?;
    let flags = u32_at(body, 8)?;
    let mut name = String::new();
    for_each_attribute(body.get(16..).unwrap_or(&[]), |kind, value| {
        if kind == IFLA_IFNAME {
            let text = value.split(|byte| *byte == 0).next().unwrap_or(value);
            name = String::from_utf8_lossy(text).into_owned();
        }
    })?;
    let [up, running, loopback] = [IFF_UP, IFF_RUNNING, IFF_LOOPBACK].map(|flag| flags & flag != 0);
    found.insert(index, Interface { name, index, up, running, loopback, addresses: Vec::new() });
    Ok(())
}

/// `struct ifaddrmsg`: family u8, prefix length u8, flags u8, scope u8, index u32; then attributes.
fn read_address(body: &[u8], found: &mut Found) -> io::Result<()> {
    let [family, prefix, short_flags, _scope] = array_at(body, 0)?;
    let index = u32_at(body, 4)?;
    let (mut local, mut address) = (None, None);
    let mut flags = u32::from(short_flags);
    for_each_attribute(body.get(8..).unwrap_or(&[]), |kind, value| match kind {
        IFA_LOCAL => local = ip(family, value),
        IFA_ADDRESS => address = ip(family, value),
        IFA_FLAGS => flags = u32_at(value, 0).unwrap_or(flags),
        _ => {}
    })?;
    // On a point-to-point link IFA_ADDRESS is the other end's and IFA_LOCAL is ours.
    let ours = local.or(address).filter(|_| flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED) == 0);
    if let (Some(ip), Some(interface)) = (ours, found.get_mut(&index)) {
        interface.addresses.push(Address { ip, prefix });
    }
    Ok(())
}

/// Calls `read` with each attribute of a list of `struct rtattr` (length u16, type u16, value).
fn for_each_attribute(mut list: &[u8], mut read: impl FnMut(u16, &[u8])) -> io::Result<()> {
    while !list.is_empty() {
        let length = usize::from(u16_at(list, 0)?);
        let kind = u16_at(list, 2)?;
        let value = list.get(4..length).ok_or_else(|| malformed("attribute cut short"))?;
        read(kind, value);
        list = list.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(())
}

fn ip(family: u8, value: &[u8]) -> Option<IpAddr> {
    match u16::from(family) {
        AF_INET => Some(Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?).into()),
        AF_INET6 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?).into()),
        _ => None,
    }
}

fn u16_at(bytes: &[u8], at: usize) -> io::Result<u16> {
    Ok(u16::from_ne_bytes(array_at(bytes, at)?))
}

fn u32_at(bytes: &[u8], at: usize) -> io::Result<u32> {
    Ok(u32::from_ne_bytes(array_at(bytes, at)?))
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    found.copied().ok_or_else(|| malformed("message cut short"))
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("netlink: {what}"))
}

const HEADER_BYTES: usize = 16;
/// Header and `struct ifinfomsg`, the longer of the two bodies; the kernel takes it for both.
const REQUEST_BYTES: usize = HEADER_BYTES + 16;
/// The kernel fills at most 32 KiB a reply (`netlink_dump`).
const REPLY_BYTES: usize = 64 << 10;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const IFLA_IFNAME: u16 = 3;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_DADFAILED: u32 = 0x08;
const IFA_F_TENTATIVE: u32 = 0x40;
const IFF_UP: u32 = 0x1;
const IFF_LOOPBACK: u32 = 0x8;
const IFF_RUNNING: u32 = 0x40;
const AF_INET: u16 = AddressFamily::INET.as_raw();
const AF_INET6: u16 = AddressFamily::INET6.as_raw();

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER_BYTES + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn link(index: u32, flags: u32, name: &str) -> Vec<u8> {
        let mut body = [[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), [0; 4]].concat();
        body.extend(attribute(IFLA_IFNAME, format!("{name}\0").as_bytes()));
        message(RTM_NEWLINK, &body)
    }

    fn address(index: u32, flags: u8, attributes: &[u8]) -> Vec<u8> {
        let mut body = [[AF_INET as u8, 24, flags, 0], index.to_ne_bytes()].concat();
        body.extend(attributes);
        message(RTM_NEWADDR, &body)
    }

    #[test]
    fn this_host_has_a_loopback_interface() {
        let interfaces = interfaces().unwrap();
        let loopback = interfaces.iter().find(|interface| interface.loopback).unwrap();
        assert_eq!(loopback.name, "lo");
    }

    #[test]
    fn a_point_to_point_link_gives_its_own_end() {
        let mut found = Found::new();
        let ends =
            [attribute(IFA_ADDRESS, &[10, 0, 0, 2]), attribute(IFA_LOCAL, &[10, 0, 0, 1])].concat();
        let reply = [link(3, IFF_UP, "tun0"), address(3, 0, &ends), message(NLMSG_DONE, &[0; 4])];
        assert_eq!(read_reply(&reply.concat(), &mut found).unwrap(), Progress::Done);
        let expected = Address { ip: [10, 0, 0, 1].into(), prefix: 24 };
        assert_eq!((found[&3].name.as_str(), &found[&3].addresses[..]), ("tun0", &[expected][..]));
    }

    #[test]
    fn an_address_still_being_checked_for_duplicates_is_left_out() {
        let mut found = Found::new();
        let reply = [
            link(3, IFF_UP, "eth0"),
            address(3, IFA_F_TENTATIVE as u8, &attribute(IFA_LOCAL, &[10, 0, 0, 1])),
        ];
        assert_eq!(read_reply(&reply.concat(), &mut found).unwrap(), Progress::More);
        assert!(found[&3].addresses.is_empty());
    }

    #[test]
    fn the_kernels_refusal_is_the_error() {
        let reply = message(NLMSG_ERROR, &(-1i32).to_ne_bytes());
        let error = read_reply(&reply, &mut Found::new()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(1));
    }
}
