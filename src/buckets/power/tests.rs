//! Whole steps of several ranks, whose all-reduces are sums in rank order.

use proptest::prelude::*;

use super::*;

fn tensor(parameter: &str, shape: &[usize], at: usize) -> Tensor {
    Tensor { parameter: parameter.into(), shape: shape.to_vec(), at }
}

fn settings(rank: usize) -> Settings {
    Settings { rank, start_step: 0, ..Settings::default() }
}

/// The mean of what all ranks give, on all of them.
fn average(parts: &mut [Vec<f32>]) {
    let count = parts[0].len();
    let world = parts.len() as f32;
    let mean: Vec<f32> =
        (0..count).map(|i| parts.iter().map(|p| p[i]).sum::<f32>() / world).collect();
    parts.iter_mut().for_each(|part| part.copy_from_slice(&mean));
}

/// One step of all ranks; what each has then, and whether it was told of something not finite.
fn step(ranks: &mut [PowerSgd], gradients: &[Vec<f32>]) -> (Vec<Vec<f32>>, Vec<bool>) {
    let mut firsts: Vec<_> = ranks.iter().map(|rank| vec![0.0; rank.first_count()]).collect();
    for ((rank, gradients), first) in ranks.iter_mut().zip(gradients).zip(&mut firsts) {
        rank.project(gradients, first);
    }
    average(&mut firsts);
    let mut seconds: Vec<_> = ranks.iter().map(|rank| vec![0.0; rank.second_count()]).collect();
    for ((rank, first), second) in ranks.iter().zip(&mut firsts).zip(&mut seconds) {
        rank.refine(first, second);
    }
    average(&mut seconds);
    let mut results = gradients.to_vec();
    let mut found = Vec::new();
    for (i, rank) in ranks.iter_mut().enumerate() {
        found.push(rank.finish(&firsts[i], &seconds[i], &mut results[i]));
        rank.settle(!found[i]);
    }
    (results, found)
}

fn random(count: usize, of: &str) -> Vec<f32> {
    let mut random = Random::of(7, of, 0, 0);
    (0..count).map(|_| random.normal()).collect()
}

/// A matrix of the given rank, and values that are not compressed behind it.
fn low_rank(rows: usize, columns: usize, rank: usize, of: &str) -> Vec<f32> {
    let left = random(rows * rank, &format!("{of} left"));
    let right = random(rank * columns, &format!("{of} right"));
    let entry = |at: usize| -> f32 {
        (0..rank).map(|k| left[at / columns * rank + k] * right[k * columns + at % columns]).sum()
    };
    (0..rows * columns).map(entry).collect()
}

fn distance(left: &[f32], right: &[f32]) -> f64 {
    let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
    left.iter().zip(right).map(square).sum::<f64>().sqrt()
}

fn length(values: &[f32]) -> f64 {
    distance(values, &vec![0.0; values.len()])
}

fn mean(gradients: &[Vec<f32>]) -> Vec<f32> {
    let mut parts = gradients.to_vec();
    average(&mut parts);
    parts.remove(0)
}

#[test]
fn matrices_of_low_rank_arrive_in_the_first_step() {
    for rank in [1, 2, 4] {
        // The ranks' gradients have the same rows in them, so their mean has no higher rank.
        let base = low_rank(40, 50, rank, "base");
        let gradients: Vec<Vec<f32>> =
            (1..4).map(|rank| base.iter().map(|x| x * rank as f32).collect()).collect();
        let mut ranks: Vec<_> = (0..3)
            .map(|_| PowerSgd::new(settings(rank), 2000, &[tensor("w", &[40, 5, 10], 0)]).unwrap())
            .collect();
        assert_eq!(ranks[0].first_count() + ranks[0].second_count(), 90 * rank);
        let (results, _) = step(&mut ranks, &gradients);
        let expected = mean(&gradients);
        let error = distance(&results[0], &expected) / length(&expected);
        assert!(error < 1e-5, "rank {rank}: {error:e}");
    }
}

/// More columns than the matrix has, and none at all.
#[test]
fn columns_that_a_matrix_does_not_need_do_no_harm() {
    let mut ranks = vec![PowerSgd::new(settings(4), 2000, &[tensor("w", &[40, 50], 0)]).unwrap()];
    for gradients in [vec![0.0; 2000], low_rank(40, 50, 1, "one"), low_rank(40, 50, 3, "three")] {
        let (results, found) = step(&mut ranks, std::slice::from_ref(&gradients));
        assert!(distance(&results[0], &gradients) <= 1e-5 * length(&gradients));
        assert_eq!(found, [false]);
    }
}

/// What has arrived after many steps is what was given, but for an error that does not grow.
#[test]
fn all_that_was_given_arrives_in_time() {
    let tensors = [tensor("w", &[30, 40], 0), tensor("b", &[30], 1200)];
    let gradients: Vec<Vec<f32>> =
        (0..4).map(|rank| random(1230, &format!("rank {rank}"))).collect();
    let expected = mean(&gradients);
    let mut ranks: Vec<_> =
        (0..4).map(|_| PowerSgd::new(settings(2), 1230, &tensors).unwrap()).collect();
    let mut arrived = vec![0.0_f32; 1230];
    let mut relative = |steps: Range<usize>| {
        for _ in steps.clone() {
            let (results, _) = step(&mut ranks, &gradients);
            arrived.iter_mut().zip(&results[0]).for_each(|(sum, x)| *sum += x);
        }
        let mean: Vec<f32> = arrived.iter().map(|sum| sum / steps.end as f32).collect();
        distance(&mean, &expected) / length(&expected)
    };
    let errors = [relative(0..1), relative(1..50), relative(50..400)];
    assert!(errors[0] > 0.5, "one step of rank 2 cannot do it: {errors:?}");
    assert!(errors[1] < 0.3 && errors[2] < 0.3 * errors[1], "{errors:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn all_ranks_get_the_same_bits_and_the_next_step_starts_from_the_same(
        world in 1..6_usize,
        rank in 1..4_usize,
        (rows, columns) in (1..40_usize, 1..40_usize),
        gap in 0..3_usize,
        start_step in 0..3_u64,
    ) {
        let size = rows * columns;
        let tensors = [
            tensor("a", &[rows, columns], gap),
            tensor("b", &[columns], gap + size),
            tensor("c", &[columns, rows, 1], gap + size + columns),
        ];
        let count = gap + 2 * size + columns;
        let settings = Settings { min_compression: 1.0, start_step, ..settings(rank) };
        let mut ranks: Vec<_> =
            (0..world).map(|_| PowerSgd::new(settings, count, &tensors).unwrap()).collect();
        for number in 0..4 {
            let gradients: Vec<Vec<f32>> =
                (0..world).map(|rank| random(count, &format!("{rank} {number}"))).collect();
            let expected = mean(&gradients);
            let (results, found) = step(&mut ranks, &gradients);
            prop_assert!(found.iter().all(|found| !found));
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            for result in &results {
                prop_assert_eq!(bits(result), bits(&results[0]));
                // What is not compressed is the mean itself.
                let vector = gap + size..gap + size + columns;
                prop_assert_eq!(&result[vector.clone()], &expected[vector]);
                prop_assert_eq!(&result[..gap], &expected[..gap]);
                if number < start_step {
                    prop_assert_eq!(result, &expected);
                }
            }
            for rank in &ranks {
                for (matrix, first) in rank.matrices.iter().zip(&ranks[0].matrices) {
                    prop_assert_eq!(bits(&matrix.factor), bits(&first.factor));
                }
            }
        }
    }
}

#[test]
fn a_step_that_is_not_finite_is_told_on_all_ranks_and_changes_nothing() {
    let tensors = [tensor("w", &[20, 30], 0), tensor("b", &[20], 600)];
    let mut ranks: Vec<_> =
        (0..3).map(|_| PowerSgd::new(settings(2), 620, &tensors).unwrap()).collect();
    let gradients: Vec<Vec<f32>> = (0..3).map(|rank| random(620, &format!("{rank}"))).collect();
    step(&mut ranks, &gradients);
    let kept = |rank: &PowerSgd| {
        let mut state = State::default();
        rank.keep(&mut state);
        (state.errors, state.factors)
    };
    let before: Vec<_> = ranks.iter().map(kept).collect();
    for (at, bad) in [(0, f32::NAN), (599, f32::INFINITY), (610, f32::NEG_INFINITY), (7, 3e38)] {
        let mut gradients = gradients.clone();
        gradients[1][at] = bad;
        gradients[2][at] = bad;
        let (_, found) = step(&mut ranks, &gradients);
        assert_eq!(found, [true; 3], "{bad} at {at}");
        assert_eq!(ranks.iter().map(kept).collect::<Vec<_>>(), before);
    }
    assert_eq!(step(&mut ranks, &gradients).1, [false; 3]);
}

#[test]
fn only_tensors_that_shrink_enough_are_compressed() {
    let by = |rank, shape: &[usize]| settings(rank).matrix_of(shape);
    assert_eq!(by(1, &[64, 3, 7, 7]), Some((64, 147)));
    assert_eq!(by(4, &[4096, 11008]), Some((4096, 11008)));
    assert_eq!(by(1, &[1024]), None);
    assert_eq!(by(1, &[]), None);
    assert_eq!(by(1, &[0, 5]), None);
    // (n + m) · r · 2 is not less than n · m.
    assert_eq!(by(1, &[4, 4]), None);
    assert_eq!(by(10, &[40, 40]), None);
    assert_eq!(by(9, &[40, 40]), Some((40, 40)));
    let lax = Settings { min_compression: 0.5, ..settings(1) };
    assert_eq!(lax.matrix_of(&[1024, 1]), Some((1024, 1)));
}

#[test]
fn state_survives_another_layout_and_a_checkpoint() {
    let old = [tensor("a", &[20, 30], 0), tensor("b", &[30, 20], 600)];
    let new = [tensor("b", &[30, 20], 0), tensor("a", &[20, 30], 600)];
    let [a, b] = ["a", "b"].map(|name| random(600, name));
    let (ab, ba) = ([a.clone(), b.clone()].concat(), [b, a].concat());
    let mut before = vec![PowerSgd::new(settings(2), 1200, &old).unwrap()];
    for _ in 0..3 {
        step(&mut before, std::slice::from_ref(&ab));
    }
    let mut state = State::default();
    before[0].keep(&mut state);
    assert_eq!(State::from_bytes(&state.to_bytes()), Ok(state.clone()));
    let mut after = vec![PowerSgd::new(settings(2), 1200, &new).unwrap()];
    after[0].recall(&state);
    for _ in 0..3 {
        let (ab, _) = step(&mut before, std::slice::from_ref(&ab));
        let (ba, _) = step(&mut after, std::slice::from_ref(&ba));
        assert_eq!([&ab[0][600..], &ab[0][..600]].concat(), ba[0]);
    }
}

/// All that is the same on all ranks is handed over; what it owes is its own.
#[test]
fn a_rank_that_joins_gets_the_same_bits_as_the_others() {
    let tensors = [tensor("w", &[20, 30], 0)];
    let mut ranks: Vec<_> =
        (0..2).map(|_| PowerSgd::new(settings(1), 600, &tensors).unwrap()).collect();
    let gradients: Vec<Vec<f32>> = (0..3).map(|rank| random(600, &format!("{rank}"))).collect();
    step(&mut ranks, &gradients[..2]);
    let mut state = State::default();
    ranks[0].keep(&mut state);
    let mut joined = PowerSgd::new(settings(1), 600, &tensors).unwrap();
    joined.recall(&State { errors: Kept::default(), ..state });
    assert!(joined.matrices[0].error.iter().all(|&error| error == 0.0));
    ranks.push(joined);
    let (results, _) = step(&mut ranks, &gradients);
    assert!(results.iter().all(|result| result == &results[0]));
}

#[test]
fn saved_bytes_that_are_cut_off_are_refused() {
    let bytes = State::default().to_bytes();
    for end in 0..bytes.len() {
        assert!(State::from_bytes(&bytes[..end]).is_err());
    }
    assert!(State::from_bytes(&[&bytes[..], &[0]].concat()).is_err());
}

/// An error that is owed in one scale is worth another in the next.
#[test]
fn errors_follow_the_loss_scale() {
    let tensors = [tensor("w", &[20, 30], 0)];
    let gradients = vec![random(600, "w")];
    let half: Vec<f32> = gradients[0].iter().map(|x| x * 0.5).collect();
    let mut ranks = vec![PowerSgd::new(settings(1), 600, &tensors).unwrap()];
    let mut scaled = vec![PowerSgd::new(settings(1), 600, &tensors).unwrap()];
    step(&mut ranks, &gradients);
    step(&mut scaled, &gradients);
    scaled[0].rescale(0.5);
    let (whole, _) = step(&mut ranks, &gradients);
    let (halved, _) = step(&mut scaled, &[half]);
    assert_eq!(whole[0].iter().map(|x| x * 0.5).collect::<Vec<_>>(), halved[0]);
}
