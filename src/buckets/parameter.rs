//! What is known of a model's parameters, and whether all ranks have the same ones.

use std::collections::HashMap;
use std::fmt;

use unisum_kernels::Dtype;

/// A parameter of a model: its name, its shape, and the type of its gradient.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    name: String,
    shape: Vec<usize>,
    dtype: Dtype,
    uses: usize,
}

impl Parameter {
    /// A parameter whose gradient has elements of `dtype`: f16, bf16, f32 or f64.
    pub fn new(name: impl Into<String>, shape: &[usize], dtype: Dtype) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), dtype, uses: 1 }
    }

    /// A tied parameter, which the model uses `times` times: its gradient is final once it was
    /// marked ready that often.
    #[must_use]
    pub fn used(self, times: usize) -> Self {
        Self { uses: times, ..self }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The type of its gradient's elements.
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The number of its elements.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    pub(super) fn bytes(&self) -> usize {
        self.count() * self.dtype.bytes()
    }

    pub(super) const fn uses(&self) -> usize {
        self.uses
    }

    fn check(&self) -> Result<(), String> {
        let mut axes = self.shape.iter().copied().chain([self.dtype.bytes()]);
        let bytes = axes.try_fold(1_usize, usize::checked_mul);
        if bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
            return Err(format!("{self} has more elements than memory can hold"));
        }
        if !matches!(self.dtype, Dtype::F16 | Dtype::Bf16 | Dtype::F32 | Dtype::F64) {
            return Err(format!("{self}: gradients are f16, bf16, f32 or f64"));
        }
        if self.uses == 0 {
            return Err(format!("{self} is used 0 times"));
        }
        Ok(())
    }
}

impl fmt::Display for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` ({} {:?}", self.name, self.dtype, self.shape)?;
        if self.uses == 1 { f.write_str(")") } else { write!(f, ", used {} times)", self.uses) }
    }
}

/// Checks what one rank can check of its list.
///
/// # Errors
/// Names the parameter that can't be.
pub(super) fn check(parameters: &[Parameter]) -> Result<(), String> {
    let mut places = HashMap::new();
    for (place, parameter) in parameters.iter().enumerate() {
        parameter.check()?;
        if let Some(earlier) = places.insert(&parameter.name, place) {
            let name = &parameter.name;
            return Err(format!("parameters {earlier} and {place} are both called `{name}`"));
        }
    }
    Ok(())
}

/// All that has to be the same on all ranks, a line for each parameter after one for the settings.
pub(super) fn signature(settings: &str, parameters: &[Parameter]) -> String {
    let lines = parameters.iter().map(|parameter| format!("\n{parameter}"));
    std::iter::once(settings.to_owned()).chain(lines).collect()
}

/// Where the signatures of two ranks differ first, in words.
pub(super) fn first_difference(
    (rank, ours): (usize, &str),
    (other_rank, others): (usize, &str),
) -> String {
    let (mut ours, mut others) = (ours.lines(), others.lines());
    for line in 0_usize.. {
        let (our, other) = match (ours.next(), others.next()) {
            (Some(our), Some(other)) if our == other => continue,
            (None, None) => break,
            pair => (pair.0.unwrap_or("not there"), pair.1.unwrap_or("not there")),
        };
        let what = match line.checked_sub(1) {
            None => return differing_settings((rank, our), (other_rank, other)),
            Some(place) => format!("parameter {place} differs"),
        };
        return format!("{what}: {our} on rank {rank}, {other} on rank {other_rank}");
    }
    "the parameters differ".to_owned()
}

/// Between the settings in a signature.
pub(super) const SETTINGS_SEPARATOR: &str = "; ";

/// Which settings differ, in words.
fn differing_settings((rank, ours): (usize, &str), (other_rank, others): (usize, &str)) -> String {
    let pairs = ours.split(SETTINGS_SEPARATOR).zip(others.split(SETTINGS_SEPARATOR));
    let (ours, others): (Vec<_>, Vec<_>) = pairs.filter(|(our, other)| our != other).unzip();
    let (ours, others) = (ours.join(", "), others.join(", "));
    format!(
        "the settings of the gradient buckets differ: {ours} on rank {rank}, {others} on rank \
         {other_rank}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list() -> Vec<Parameter> {
        vec![
            Parameter::new("embedding", &[100, 8], Dtype::F32).used(2),
            Parameter::new("bias", &[8], Dtype::F32),
        ]
    }

    #[test]
    fn lists_that_can_not_be_are_refused_by_name() {
        let with = |parameter: Parameter| [list(), vec![parameter]].concat();
        let refused = |list: &[Parameter]| check(list).unwrap_err();
        assert!(check(&list()).is_ok());
        assert!(check(&[]).is_ok());
        let twice = refused(&with(Parameter::new("bias", &[1], Dtype::F32)));
        assert_eq!(twice, "parameters 1 and 2 are both called `bias`");
        let huge = refused(&with(Parameter::new("w", &[usize::MAX, 2], Dtype::F32)));
        assert!(huge.contains("`w`") && huge.contains("memory"), "{huge}");
        let ints = refused(&with(Parameter::new("w", &[2], Dtype::I32)));
        assert!(ints.contains("`w` (i32 [2])"), "{ints}");
        assert!(refused(&with(Parameter::new("w", &[2], Dtype::F32).used(0))).contains("0 times"));
    }

    #[test]
    fn the_first_difference_is_named() {
        let difference = |settings: &str, change: fn(&mut Vec<Parameter>)| {
            let mut other = list();
            change(&mut other);
            first_difference((0, &signature("s", &list())), (3, &signature(settings, &other)))
        };
        let shape = difference("s", |list| list[1].shape = vec![9]);
        assert_eq!(
            shape,
            "parameter 1 differs: `bias` (f32 [8]) on rank 0, `bias` (f32 [9]) on rank 3"
        );
        let fewer = difference("s", |list| drop(list.pop()));
        assert!(fewer.ends_with("not there on rank 3"), "{fewer}");
        let more = difference("s", |list| list.push(Parameter::new("c", &[], Dtype::F16)));
        assert_eq!(more, "parameter 2 differs: not there on rank 0, `c` (f16 []) on rank 3");
        assert!(difference("t", |_| {}).starts_with("the settings"));
    }
}
