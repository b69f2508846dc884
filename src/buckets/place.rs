//! Where a gradient lies, for who can't be held to a borrow: bindings to other languages.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use unisum_kernels::Dtype;

use super::plan::Plan;

/// The memory of a parameter's gradient ([`Step::place`](super::Step::place),
/// [`Buckets::place`](super::Buckets::place)), which stays where it is while this lives, also when
/// buckets were laid out anew or are gone.
///
/// When it may be touched is up to the program: from the beginning of a step until the gradient is
/// marked ready, and once the step has ended.
#[derive(Clone)]
pub struct Place {
    plan: Arc<Plan>,
    parameter: usize,
}

impl Place {
    /// # Panics
    /// If there is no such parameter.
    pub(super) fn new(plan: Arc<Plan>, parameter: usize) -> Self {
        assert!(parameter < plan.parameters.len(), "there is no parameter {parameter}");
        Self { plan, parameter }
    }

    /// The address of the first element.
    pub fn start(&self) -> NonNull<u8> {
        self.plan.gradient(self.parameter).0
    }

    /// How many elements there are, back to back.
    pub fn count(&self) -> usize {
        self.plan.parameters[self.parameter].count()
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.plan.parameters[self.parameter].dtype()
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.plan.describe(self.parameter))
    }
}
