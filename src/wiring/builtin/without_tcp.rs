//! No TCP in this build.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use unisum_link::secure::Credentials;
use unisum_link::{Reach, Refusal, Transport};

use super::Barred;
use crate::settings::Settings;

pub(super) const IS_BUILT: bool = false;

pub(in crate::wiring) fn internet(
    _: &Settings,
    _: &Credentials,
    _: (Vec<Vec<SocketAddr>>, Option<SocketAddr>),
    _: &str,
) -> Arc<dyn Transport> {
    let why = "some ranks share no memory with this one, and this build has no TCP transport";
    Barred::new("tcp", Reach::Any, Refusal::NotWanted(why.into()))
}

pub(in crate::wiring) fn prepare_listener(_: &TcpListener) {}
