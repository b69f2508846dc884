//! The RDMA devices of this host and their addresses, as reported by the kernel under /sys.

use std::fmt;
use std::fs;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use crate::error::VerbsError;
use crate::filter::DeviceFilter;

/// Where the kernel lists RDMA devices.
const DEVICES: &str = "/sys/class/infiniband";

/// A port of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The device's name, as in `mlx5_0`.
    pub device: String,
    /// Number of the port, from 1.
    pub number: u8,
    /// `ACTIVE`, `DOWN` and so on; empty if the kernel does not report it.
    pub state: String,
    /// Version of the device's firmware; empty if it has none.
    pub firmware: String,
    /// Rate, as in `100 Gb/sec (4X EDR)`.
    pub rate: String,
    /// Whether it is Ethernet (RoCE) and not InfiniBand.
    pub is_ethernet: bool,
    /// Whether it is a software device (rxe, siw), which is on no bus.
    pub is_software: bool,
    /// Its addresses, ascending.
    pub gids: Vec<Gid>,
}

/// An address of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gid {
    /// Its place in the port's table.
    pub index: u8,
    /// The address, in network order.
    pub raw: [u8; 16],
    /// Whether it uses RoCE v2 (over UDP).
    pub is_v2: bool,
}

impl Port {
    /// Whether it can carry traffic now.
    pub fn is_active(&self) -> bool {
        self.state == "ACTIVE"
    }

    /// The address to use. InfiniBand has one. For RoCE, version 2 is preferred, which routers
    /// forward, then IPv4, then addresses that are not link-local.
    ///
    /// # Errors
    /// What is missing, as text that continues after the port's name.
    pub fn gid(&self, wanted: Option<u8>) -> Result<Gid, String> {
        if let Some(index) = wanted {
            let gid = self.gids.iter().find(|gid| gid.index == index);
            return gid.copied().ok_or_else(|| {
                let known: Vec<String> = self.gids.iter().map(Gid::to_string).collect();
                format!("has no GID {index}; it has {}", known.join(", "))
            });
        }
        let best = if self.is_ethernet {
            self.gids.iter().max_by_key(|gid| (gid.preference(), u8::MAX - gid.index))
        } else {
            self.gids.first()
        };
        best.copied().ok_or_else(|| "has no GID: has its interface an address?".into())
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_ethernet { "RoCE" } else { "InfiniBand" };
        write!(f, "{}:{} {kind}", self.device, self.number)?;
        f.write_str(if self.is_software { " in software" } else { "" })?;
        for (word, value) in [("", &self.state), ("", &self.rate), ("firmware ", &self.firmware)] {
            if !value.is_empty() {
                write!(f, ", {word}{value}")?;
            }
        }
        Ok(())
    }
}

impl Gid {
    fn address(&self) -> Ipv6Addr {
        Ipv6Addr::from(self.raw)
    }

    fn preference(&self) -> (bool, u8) {
        let address = self.address();
        let reach = match address.to_ipv4_mapped() {
            Some(_) => 2,
            None => u8::from(!address.is_unicast_link_local()),
        };
        (self.is_v2, reach)
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { index, is_v2, .. } = self;
        match self.address().to_ipv4_mapped() {
            Some(address) => write!(f, "{index}: {address}")?,
            None => write!(f, "{index}: {}", self.address())?,
        }
        f.write_str(if *is_v2 { " (RoCE v2)" } else { "" })
    }
}

/// All ports of all RDMA devices, by name. Empty if the kernel knows none.
pub fn ports() -> Vec<Port> {
    ports_in(Path::new(DEVICES))
}

fn ports_in(devices: &Path) -> Vec<Port> {
    let mut ports: Vec<Port> = entries(devices)
        .into_iter()
        .flat_map(|device| {
            let numbers = entries(&device.join("ports"));
            numbers.into_iter().filter_map(move |port| read_port(&device, &port))
        })
        .collect();
    // Numbers in names are compared as numbers: mlx5_2 comes before mlx5_10.
    ports.sort_by_cached_key(|port| (port.device.len(), port.device.clone(), port.number));
    ports
}

fn read_port(device: &Path, port: &Path) -> Option<Port> {
    let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
    let after_colon = |text: String| {
        text.split_once(": ").map_or_else(|| text.clone(), |(_, word)| word.to_owned())
    };
    Some(Port {
        device: name(device)?,
        number: name(port)?.parse().ok()?,
        state: after_colon(read(&port.join("state"))),
        firmware: read(&device.join("fw_ver")),
        rate: read(&port.join("rate")),
        is_ethernet: read(&port.join("link_layer")) == "Ethernet",
        is_software: !device.join("device").exists(),
        gids: read_gids(port),
    })
}

fn read_gids(port: &Path) -> Vec<Gid> {
    let read_gid = |path: &PathBuf| {
        let index: u8 = path.file_name()?.to_str()?.parse().ok()?;
        let raw = read(path).parse::<Ipv6Addr>().ok()?.octets();
        // Unused entries are zero, or a prefix without an interface.
        let is_used = raw[8..] != [0; 8];
        let kind = read(&port.join("gid_attrs/types").join(index.to_string()));
        is_used.then_some(Gid { index, raw, is_v2: kind == "RoCE v2" })
    };
    let mut gids: Vec<Gid> = entries(&port.join("gids")).iter().filter_map(read_gid).collect();
    gids.sort_by_key(|gid| gid.index);
    gids
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
}

/// The text of a file, trimmed; empty if there is none, as for entries of other namespaces.
fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// The ports to use, in order: those that are active and that the user named, or, without a filter,
/// all active hardware ports (`software` allows the others, too).
///
/// # Errors
/// Why there is none.
pub(crate) fn choose(
    ports: Vec<Port>,
    filter: Option<&DeviceFilter>,
    software: bool,
) -> Result<Vec<Port>, VerbsError> {
    if ports.is_empty() {
        return Err(VerbsError::Absent("this host has no RDMA device".into()));
    }
    let listed = |ports: &[Port]| {
        let texts: Vec<String> = ports.iter().map(Port::to_string).collect();
        texts.join("; ")
    };
    let all = listed(&ports);
    let allows = |port: &Port| match filter {
        Some(filter) => {
            filter.allows(&port.device, port.number)
                && (software || !port.is_software || filter.names(&port.device, port.number))
        }
        None => software || !port.is_software,
    };
    let mut allowed: Vec<Port> = ports.into_iter().filter(allows).collect();
    if allowed.is_empty() {
        return Err(match filter {
            Some(filter) => VerbsError::Device(format!(
                "the filter {filter} leaves none of the RDMA devices ({all})"
            )),
            None => VerbsError::Absent(format!(
                "the RDMA devices are software, used only if named ({all})"
            )),
        });
    }
    if let Some(filter) = filter {
        allowed.sort_by_key(|port| filter.position(&port.device, port.number));
    }
    let found = listed(&allowed);
    allowed.retain(Port::is_active);
    if allowed.is_empty() {
        let text = format!("no port of the RDMA devices is active ({found})");
        return Err(VerbsError::Device(text));
    }
    Ok(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(device: &str, state: &str, is_software: bool) -> Port {
        Port {
            device: device.into(),
            number: 1,
            state: state.into(),
            firmware: String::new(),
            rate: String::new(),
            is_ethernet: true,
            is_software,
            gids: Vec::new(),
        }
    }

    fn gid(index: u8, address: &str, is_v2: bool) -> Gid {
        Gid { index, raw: address.parse::<Ipv6Addr>().unwrap().octets(), is_v2 }
    }

    #[test]
    fn roce_v2_over_ipv4_is_preferred_and_an_index_wins() {
        let mut port = port("mlx5_0", "ACTIVE", false);
        assert!(port.gid(None).unwrap_err().contains("has no GID"));
        port.gids = vec![
            gid(0, "fe80::1", false),
            gid(1, "fe80::1", true),
            gid(2, "::ffff:10.0.0.1", false),
        ];
        assert_eq!(port.gid(None).unwrap().index, 1);
        port.gids.push(gid(4, "2001:db8::1", true));
        assert_eq!(port.gid(None).unwrap().index, 4);
        port.gids.push(gid(5, "::ffff:10.0.0.1", true));
        port.gids.push(gid(6, "::ffff:10.0.0.2", true));
        assert_eq!(port.gid(None).unwrap().index, 5);
        assert_eq!(port.gid(Some(2)).unwrap().index, 2);
        assert!(port.gid(Some(3)).unwrap_err().contains("5: 10.0.0.1 (RoCE v2)"));
        port.is_ethernet = false;
        assert_eq!(port.gid(None).unwrap().index, 0);
    }

    #[test]
    fn only_active_ports_are_chosen_and_software_only_if_named() {
        let all = || vec![port("mlx5_0", "DOWN", false), port("rxe0", "ACTIVE", true)];
        let names = |filter: Option<&str>, software| {
            let filter = filter.map(|text| text.parse::<DeviceFilter>().unwrap());
            choose(all(), filter.as_ref(), software)
                .map_err(|error| error.to_string())
                .map(|ports| ports.into_iter().map(|port| port.device).collect::<Vec<_>>())
        };
        assert!(choose(Vec::new(), None, true).unwrap_err().to_string().contains("no RDMA device"));
        assert!(names(None, false).unwrap_err().contains("active (mlx5_0:1 RoCE, DOWN)"));
        assert_eq!(names(None, true).unwrap(), ["rxe0"]);
        assert_eq!(names(Some("rxe"), false).unwrap(), ["rxe0"]);
        assert!(names(Some("^mlx5"), false).unwrap_err().contains("leaves none"));
        assert_eq!(names(Some("^mlx5"), true).unwrap(), ["rxe0"]);
    }

    #[test]
    fn sysfs_is_read_and_what_it_lacks_is_left_out() {
        let root = std::env::temp_dir().join(format!("unisum-verbs-{}", std::process::id()));
        let port = root.join("mlx5_10/ports/1");
        fs::create_dir_all(port.join("gid_attrs/types")).unwrap();
        fs::create_dir_all(port.join("gids")).unwrap();
        fs::create_dir_all(root.join("mlx5_2/ports/1")).unwrap();
        for (file, text) in [
            ("state", "4: ACTIVE\n"),
            ("link_layer", "Ethernet\n"),
            ("gids/0", "0000:0000:0000:0000:0000:ffff:0a00:0001\n"),
            ("gids/1", "fe80:0000:0000:0000:0000:0000:0000:0000\n"),
            ("gid_attrs/types/0", "RoCE v2\n"),
        ] {
            fs::write(port.join(file), text).unwrap();
        }
        let ports = ports_in(&root);
        fs::remove_dir_all(&root).unwrap();
        assert_eq!((&*ports[0].device, ports[0].is_active()), ("mlx5_2", false));
        assert_eq!(ports[1].gids, [gid(0, "::ffff:10.0.0.1", true)]);
        assert_eq!(ports[1].to_string(), "mlx5_10:1 RoCE in software, ACTIVE");
    }
}
