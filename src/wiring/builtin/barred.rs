//! Transports that a rank may not use, or that its build lacks. It still takes part in agreeing, so
//! that all ranks do without them.

use std::sync::Arc;

use unisum_link::{Endpoint, Reach, Refusal, Site, Transport};

/// A transport that refuses.
#[derive(Debug)]
pub(in crate::wiring) struct Barred {
    name: &'static str,
    reach: Reach,
    refusal: Refusal,
    /// Where this has no endpoint either, nobody misses it.
    instead_of: Option<Arc<dyn Transport>>,
}

impl Barred {
    /// Refuses with this.
    pub(in crate::wiring) fn new(name: &'static str, reach: Reach, refusal: Refusal) -> Arc<Self> {
        Arc::new(Self { name, reach, refusal, instead_of: None })
    }

    /// Refuses with `why` what would be there.
    pub(in crate::wiring) fn instead_of(transport: Arc<dyn Transport>, why: &str) -> Arc<Self> {
        let (name, reach) = (transport.name(), transport.reach());
        let refusal = Refusal::Own(why.into());
        Arc::new(Self { name, reach, refusal, instead_of: Some(transport) })
    }
}

impl Transport for Barred {
    fn name(&self) -> &'static str {
        self.name
    }

    fn reach(&self) -> Reach {
        self.reach
    }

    fn endpoint(&self, site: &Site<'_>) -> Result<Box<dyn Endpoint>, Refusal> {
        match self.instead_of.as_ref().map(|it| it.endpoint(site)) {
            Some(Err(_)) => Err(Refusal::NotWanted(self.refusal.why().into())),
            _ => Err(self.refusal.clone()),
        }
    }
}
