//! Comparison of a launch with the reference.

use super::case::{Case, Outcome, UNTOUCHED};
use crate::common::Float;
use dllm_kernels::reference::vverify::{cosine, lowest, write_selected};

/// Bound of the error of a cosine.
const NEAR: f64 = 1e-6;

/// Results that the reference expects of a case.
struct Expected {
    similarity: Vec<f64>,
    cached: Vec<u16>,
    failed: i32,
}

impl<T: Float> Case<T> {
    /// Compares results with the reference. Returns the number of sequences whose selections differ by rows near the boundary.
    #[track_caller]
    pub fn check(&self, got: &Outcome) -> usize {
        let Expected { similarity, cached, mut failed } = self.expected();
        assert!(got.cached == cached, "the cached rows differ");
        if self.optional_outputs {
            for (row, (got, want)) in got.similarity.iter().zip(&similarity).enumerate() {
                if want.is_nan() {
                    assert_eq!(*got, f32::NEG_INFINITY, "row {row}");
                } else {
                    assert!((f64::from(*got) - want).abs() <= NEAR, "row {row}: {got}, expected {want}");
                }
            }
        }

        let (mut near, mut num_selected) = (0, 0);
        let mut lists = vec![vec![UNTOUCHED; self.listed()]; 1 + got.selected.len()];
        for s in 0..self.cu_rows.len() - 1 {
            assert_eq!(got.cu_selected[s] as usize, num_selected, "first selected row of sequence {s}");
            let begins = self.first_selected.as_ref().map_or(num_selected as i32, |first| first[s]);
            let (selected, differs) = self.check_sequence(got, s, begins, &similarity);
            near += usize::from(differs);
            num_selected += selected.len();
            let values = |table: &Vec<i32>| selected.iter().map(|row| table[*row as usize]).collect::<Vec<_>>();
            let tables: Vec<_> = self.tables.iter().flatten().map(values).collect();
            for (values, list) in [&selected].into_iter().chain(&tables).zip(&mut lists) {
                if !write_selected(values, begins, list) {
                    failed = -2;
                }
            }
        }
        assert_eq!(*got.cu_selected.last().unwrap() as usize, num_selected);
        assert!([&got.indices].into_iter().chain(&got.selected).eq(&lists), "the lists differ");
        if self.optional_outputs {
            assert_eq!(got.failed, failed);
        }
        near
    }

    /// Compares the selection of one sequence, whose list starts at element `begins`. Returns the selected rows of the batch,
    /// and whether the selection of the reference differs. It may differ only in rows near the boundary.
    #[track_caller]
    fn check_sequence(&self, got: &Outcome, s: usize, begins: i32, similarity: &[f64]) -> (Vec<i32>, bool) {
        let rows = self.cu_rows[s] as usize..self.cu_rows[s + 1] as usize;
        let cosines = &similarity[rows.clone()];
        let want = lowest(cosines, self.ratio);
        // Selected rows outside the list cannot be read: those of the reference take their place.
        let listed = |j: usize| got.indices.get(usize::try_from(i64::from(begins) + j as i64).ok()?);
        let selected: Vec<usize> =
            want.iter().enumerate().map(|(j, i)| listed(j).map_or(*i, |row| *row as usize - rows.start)).collect();
        if self.optional_outputs {
            let own: Vec<f64> = got.similarity[rows.clone()].iter().map(|x| f64::from(*x)).collect();
            assert_eq!(selected, lowest(&own, self.ratio), "sequence {s}, by the cosines of the kernel");
        }
        if selected != want {
            let boundary = want.iter().map(|i| cosines[*i]).fold(f64::NEG_INFINITY, f64::max);
            let is_near = |i: &usize| (cosines[*i] - boundary).abs() <= NEAR;
            let agree = |a: &[usize], b: &[usize]| a.iter().all(|i| b.contains(i) || is_near(i));
            assert!(
                agree(&selected, &want) && agree(&want, &selected),
                "sequence {s}: {selected:?}, expected {want:?}"
            );
        }
        (selected.iter().map(|i| (rows.start + i) as i32).collect(), selected != want)
    }

    /// Returns the cosines (NaN for rows out of range), the cached rows and the failure code after a launch.
    fn expected(&self) -> Expected {
        let row_of = |matrix: &[T], row: usize| -> Option<Vec<f32>> {
            Some(matrix.chunks_exact(self.width).nth(row)?.iter().map(|x| x.f32()).collect())
        };
        let mut cached: Vec<u16> = bytemuck::cast_slice(&self.cached).to_vec();
        let mut similarity = vec![f64::from(UNTOUCHED); self.rows()];
        let mut failed = -1;
        for row in 0..*self.cu_rows.last().unwrap() as usize {
            let [fresh_row, cached_row] =
                [&self.fresh_row, &self.cached_row].map(|map| map.as_ref().map_or(row, |map| map[row] as usize));
            let pair = (row_of(&self.fresh, fresh_row), row_of(&self.cached, cached_row));
            let (Some(fresh), Some(old)) = pair else {
                (similarity[row], failed) = (f64::NAN, -2);
                continue;
            };
            similarity[row] = cosine(&fresh, &old);
            if self.update_cached {
                let fresh = bytemuck::cast_slice(&self.fresh[fresh_row * self.width..(fresh_row + 1) * self.width]);
                cached[cached_row * self.width..(cached_row + 1) * self.width].copy_from_slice(fresh);
            }
        }
        Expected { similarity, cached, failed }
    }
}
