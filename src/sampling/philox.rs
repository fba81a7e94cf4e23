//! Philox 4x32-10, the counter-based random number generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
//! (SC 2011).
//!
//! A random number is a function of (seed, purpose, step, position, token) only. It is the same on every backend, in every
//! order of execution and in every batch.

/// Use of a random number. It is part of the counter, so that different purposes never share numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Gumbel noise on a token's logit.
    Token = 0,
    /// Random confidence of a candidate.
    Confidence = 1,
    /// Gumbel noise on a position's rank (`alg_temp`).
    Rank = 2,
}

/// Computes ten Philox rounds of a 128-bit counter with a 64-bit key.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        let a = 0xD251_1F53 * counter[0] as u64;
        let b = 0xCD9E_8D57 * counter[2] as u64;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
    }
    counter
}

/// Returns a uniform random number in (0, 1): the middle of one of 2^52 equal intervals, never 0 or 1.
pub fn uniform(seed: u64, purpose: Purpose, step: usize, position: usize, token: usize) -> f64 {
    let counter = [token as u32, position as u32, step as u32, purpose as u32];
    let word = philox(counter, [seed as u32, (seed >> 32) as u32]);
    let bits = (word[0] as u64) << 20 | (word[1] as u64) >> 12;
    (bits as f64 + 0.5) / (1u64 << 52) as f64
}

/// Returns standard Gumbel noise, `-ln(-ln u)` of [`uniform`].
pub fn gumbel(seed: u64, purpose: Purpose, step: usize, position: usize, token: usize) -> f64 {
    -(-uniform(seed, purpose, step, position, token).ln()).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers that the authors publish with their code.
    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_has_the_moments_of_its_distribution() {
        let draws: Vec<f64> = (0..100_000).map(|t| uniform(7, Purpose::Token, 3, 9, t)).collect();
        assert!(draws.iter().all(|u| *u > 0.0 && *u < 1.0));
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let square = draws.iter().map(|u| u * u).sum::<f64>() / draws.len() as f64;
        assert!((mean - 0.5).abs() < 0.005 && (square - 1.0 / 3.0).abs() < 0.005);
    }
}
