//! What the arguments ask to be measured in a world.

use std::ops::Range;

use unisum::{Dtype, ReduceOp};

use crate::args::{Args, Roots};
use crate::collective::{Case, Kind, Place};

impl Args {
    /// Collectives with a root and a place, whose count is still open: a table each. Those that
    /// lack the algorithm that was asked for are left out.
    ///
    /// # Errors
    /// If there is no such root, or no size that the elements of some collective fit.
    pub(crate) fn series(&self, ranks: usize) -> Result<Vec<Case>, String> {
        if let Roots::One(root) = self.root
            && root >= ranks
        {
            return Err(format!("--root {root}: the last of {ranks} ranks is {}", ranks - 1));
        }
        let mut series = Vec::new();
        for &kind in self.collective.0.iter().filter(|kind| !self.algorithms(**kind).is_empty()) {
            for root in self.roots(kind, ranks) {
                let case = |place| Case { kind, root, place, ranks, count: 0 };
                series.extend(self.places(kind).into_iter().map(case));
            }
        }
        for case in &series {
            if let Some(dtype) =
                self.dtypes(case.kind).iter().find(|dtype| self.counts(case, **dtype).is_empty())
            {
                let (kind, bytes) = (case.kind, case.kind.count_unit(ranks) * dtype.bytes());
                return Err(format!(
                    "{kind} on {ranks} ranks: one {dtype} of each is {bytes} B, which no size \
                     holds (-b, -e)"
                ));
            }
        }
        Ok(series)
    }

    /// What is left out or measured otherwise than asked for: a sentence each.
    pub(crate) fn notes(&self) -> Vec<String> {
        let kinds = &self.collective.0;
        let mut notes = Vec::new();
        if kinds.iter().any(|kind| kind.reduces()) {
            notes.extend(self.undefined());
        }
        for kind in kinds.iter().filter(|kind| self.algorithms(**kind).is_empty()) {
            notes.push(format!("{kind} has no algorithm {}", self.algorithm));
        }
        for dtype in &self.dtype.0 {
            let bytes = dtype.bytes() as u64;
            if self.sizes().any(|size| !size.is_multiple_of(bytes)) {
                notes.push(format!("sizes are rounded down to whole {dtype} ({bytes} B)"));
            }
        }
        notes
    }

    fn roots(&self, kind: Kind, ranks: usize) -> Range<usize> {
        match self.root {
            _ if !kind.has_root() => 0..1,
            Roots::One(root) => root..root + 1,
            Roots::All => 0..ranks,
        }
    }

    fn places(&self, kind: Kind) -> Vec<Place> {
        match self.place {
            _ if !kind.moves_elements() => vec![kind.usual_place()],
            None => vec![kind.usual_place()],
            Some(places) => places.list(),
        }
    }

    /// The element types; a barrier has none, so that one call stands for all.
    pub(crate) fn dtypes(&self, kind: Kind) -> &[Dtype] {
        let all = &self.dtype.0;
        if kind.moves_elements() { all } else { &all[..all.len().min(1)] }
    }

    /// The reductions that elements of this type have; `None` stands for reducing nothing.
    pub(crate) fn reductions(&self, kind: Kind, dtype: Dtype) -> Vec<Option<ReduceOp>> {
        if kind.reduces() { self.operations(dtype).map(Some).collect() } else { vec![None] }
    }

    /// The counts of a series, ascending: the sizes rounded down to what the collective can have.
    pub(crate) fn counts(&self, series: &Case, dtype: Dtype) -> Vec<usize> {
        if !series.kind.moves_elements() {
            return vec![0];
        }
        let unit = series.kind.count_unit(series.ranks);
        let counts = self.sizes().map(|bytes| bytes as usize / dtype.bytes() / unit * unit);
        let mut counts: Vec<_> = counts.filter(|count| *count > 0).collect();
        counts.dedup();
        counts
    }

    /// How many measurements a series is.
    pub(crate) fn points(&self, series: &Case) -> usize {
        let reductions = |dtype| self.reductions(series.kind, dtype).len();
        let dtypes = self.dtypes(series.kind).iter();
        let points = dtypes.map(|&dtype| reductions(dtype) * self.counts(series, dtype).len());
        points.sum::<usize>() * self.algorithms(series.kind).len()
    }

    /// Algorithms to measure; `None` is the automatic choice.
    pub(crate) fn algorithms(&self, kind: Kind) -> Vec<Option<&'static str>> {
        let all = kind.algorithms().into_iter().map(Some);
        match self.algorithm.as_str() {
            "auto" => vec![None],
            "all" => all.collect(),
            name => all.filter(|algorithm| *algorithm == Some(name)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    fn series(line: &str, ranks: usize) -> Vec<Case> {
        let args = Args::try_parse_from(["bench"].into_iter().chain(line.split(' '))).unwrap();
        args.series(ranks).unwrap()
    }

    #[test]
    fn roots_and_places_are_a_table_each() {
        assert_eq!(series("--collective broadcast --root all --place both", 3).len(), 6);
        assert_eq!(series("--collective all_gather --root all", 3).len(), 1);
        assert_eq!(series("--collective all", 3).len(), Kind::ALL.len());
    }

    #[test]
    fn collectives_without_the_algorithm_are_left_out() {
        let rings = series("--collective all -a ring", 3);
        assert!(!rings.is_empty() && rings.len() < Kind::ALL.len());
    }

    #[test]
    fn sizes_are_whole_elements_of_each_block() {
        let args = Args::try_parse_from(["bench", "-b", "8", "-e", "64"]).unwrap();
        let counts = |name: &str, ranks| {
            let kind = name.parse().unwrap();
            args.counts(&Case { kind, root: 0, place: Place::Out, ranks, count: 0 }, Dtype::F32)
        };
        assert_eq!(counts("all_gather", 3), [3, 6, 15]);
        assert_eq!(counts("all_gather_v", 3), [2, 4, 8, 16]);
        assert_eq!(counts("barrier", 3), [0]);
    }
}
