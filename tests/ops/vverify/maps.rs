//! Row maps, lists and tables.

use super::case::Case;
use crate::common::on_device;
use half::{bf16, f16};

on_device! {
    cached_rows_by_a_map,
    fresh_rows_by_a_map,
    lists_inside_larger_ones,
    elements_outside_the_lists,
    identity_maps_change_nothing,
    strides_and_optional_outputs,
}

fn cached_rows_by_a_map() {
    let mut case = Case::<bf16>::new(&[13, 24], 72, 0.3);
    case.cached.extend(vec![bf16::ONE; 72 * 10]);
    let map: Vec<i32> = (0..37).map(|row| row * 11 % 47).collect();
    let cached = case.cached.clone();
    for (row, target) in map.iter().enumerate() {
        let target = *target as usize * 72;
        case.cached[target..target + 72].copy_from_slice(&cached[row * 72..(row + 1) * 72]);
    }
    case.cached_row = Some(map);
    case.agrees();
    case.update_cached = true;
    case.agrees();

    // Out of range: reported, counted as the lowest, neither read nor written.
    let map = case.cached_row.as_mut().unwrap();
    (map[2], map[9], map[30]) = (47, i32::MIN, i32::MAX);
    let got = case.run();
    assert_eq!((case.check(&got), got.failed), (0, -2));
    assert!([2, 9, 30].iter().all(|row| got.indices.contains(row)));
    // Without a map, fresh rows beyond the cached ones.
    let mut case = Case::<bf16>::new(&[6], 16, 0.5);
    case.cached.truncate(4 * 16);
    let got = case.run();
    assert_eq!((case.check(&got), got.failed), (0, -2));
    assert!(got.indices.contains(&4) && got.indices.contains(&5));
}

/// Fresh rows are anywhere in a larger pass, and are cached under their own numbers.
fn fresh_rows_by_a_map() {
    let mut case = Case::<bf16>::new(&[13, 0, 24], 72, 0.3);
    let map: Vec<i32> = (0..37).map(|row| row * 11 % 47).collect();
    let fresh = case.fresh.clone();
    case.fresh = vec![bf16::ONE; 47 * 72];
    for (row, to) in map.iter().enumerate() {
        case.fresh[*to as usize * 72..][..72].copy_from_slice(&fresh[row * 72..][..72]);
    }
    case.fresh_row = Some(map);
    case.agrees();
    case.update_cached = true;
    case.agrees();
    case.cached_row = Some((0..37).rev().collect());
    case.pad = [8, 16];
    case.agrees();

    // Out of range: reported, counted as the lowest, not read, and the cached row is not written.
    let map = case.fresh_row.as_mut().unwrap();
    (map[2], map[9], map[30], map[36]) = (47, -1, i32::MAX, i32::MIN);
    let got = case.run();
    assert_eq!((case.check(&got), got.failed), (0, -2));
    assert!([2, 9, 30, 36].iter().all(|row| got.indices.contains(row)));
    // Fewer fresh rows than compared rows: several rows map to the same one.
    let mut case = Case::<f16>::new(&[9], 16, 0.5);
    case.fresh.truncate(2 * 16);
    case.fresh_row = Some(vec![1, 0, 1, 1, 0, 0, 1, 0, 1]);
    case.agrees();
}

/// Returns a case whose lists have 3,000 elements, with the sequences in another order.
pub fn within_a_table() -> Case<bf16> {
    let mut case = Case::<bf16>::new(&[20, 0, 270, 3, 30], 24, 0.4);
    case.first_selected = Some(vec![2990, 5, 700, 0, 100]);
    case.num_listed = 3000;
    case.tables = [5, 7, 11].map(|factor| Some((0..323).map(|row| row * factor % 323).collect()));
    case
}

/// The elements between the parts are not written.
fn lists_inside_larger_ones() {
    let case = within_a_table();
    case.agrees();
    let [some, other] = [&case.tables[0], &case.tables[1]].map(Clone::clone);
    for tables in [[None, some.clone(), None], [other, None, some], Default::default()] {
        Case { tables, ..case.clone() }.agrees();
    }
    // Without `first_selected`, the sequences follow each other.
    Case { first_selected: None, ..case.clone() }.agrees();
    Case { first_selected: None, num_listed: 0, ..case }.agrees();
}

fn elements_outside_the_lists() {
    let case = within_a_table();
    assert_eq!(case.run().failed, -1);
    for first_selected in [
        vec![2993, 5, 700, 0, 100],
        vec![2990, 5, 700, -1, 100],
        vec![2990, 5, 700, 90, -11],
        vec![3000, 5, 700, 0, 100],
        vec![i32::MAX, 5, i32::MIN, i32::MAX, i32::MIN],
    ] {
        let case = Case { first_selected: Some(first_selected), ..case.clone() };
        let got = case.run();
        assert_eq!((case.check(&got), got.failed), (0, -2));
        Case { optional_outputs: false, ..case }.agrees();
    }
    // Lists that are too short, without `first_selected`: 8 of 20, none, 108 of 270, 1 of 3, 12 of 30 rows are selected.
    let case = Case { first_selected: None, ..case };
    for (num_listed, failed) in [(1, -2), (8, -2), (128, -2), (129, -1)] {
        let case = Case { num_listed, ..case.clone() };
        let got = case.run();
        assert_eq!((case.check(&got), got.failed), (0, failed));
    }
}

fn identity_maps_change_nothing() {
    let mut plain = Case::<f16>::new(&[19, 0, 30], 264, 0.25);
    plain.update_cached = true;
    let mut case = plain.clone();
    [case.fresh_row, case.cached_row, case.tables[2]] = [(); 3].map(|_| Some((0..49).collect()));
    case.first_selected = Some(vec![0, 4, 4]);
    case.num_listed = 49;
    let (want, got) = (plain.run(), case.run());
    assert_eq!((case.check(&got), &got.selected), (0, &vec![want.indices.clone()]));
    assert_eq!((got.indices, got.cu_selected, got.cached), (want.indices, want.cu_selected, want.cached));
    let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!((bits(got.similarity), got.failed), (bits(want.similarity), want.failed));
}

fn strides_and_optional_outputs() {
    for (pad, update_cached, optional_outputs) in
        [([8, 24], true, true), ([24, 0], false, true), ([0, 8], true, false), ([0, 0], false, false)]
    {
        let case = Case::<f16>::new(&[19, 0, 30], 264, 0.25);
        let case = Case { pad, update_cached, optional_outputs, ..case };
        case.agrees();
        // Neither strides nor the update change the selection.
        let plain = Case { pad: [0; 2], update_cached: false, ..case.clone() };
        assert_eq!(plain.run().indices, case.run().indices);
    }
}
