//! The shipped checkpoint answers as many of its first 100 problems as it does in the original implementations
//! (`models/tiny-math/originals.md`), for every cache and policy.

#![cfg(feature = "cli")]

use std::process::Command;

/// (prompt interval, response interval, share) of the adaptive cache, one token a step; and the original's accuracy.
const ADAPTIVE: [(usize, usize, f64, f64); 3] = [(25, 2, 0.25, 0.59), (25, 8, 0.25, 0.19), (25, 8, 0.0, 0.05)];

#[test]
#[cfg_attr(debug_assertions, ignore = "needs --release: minutes without optimisation")]
fn accuracy_with_the_adaptive_cache_is_the_original_s() {
    let root = env!("CARGO_MANIFEST_DIR");
    let setting = |(prompt, response, ratio, _): &(usize, usize, f64, f64)| {
        let intervals = format!("prompt-interval={prompt},response-interval={response},refresh-ratio={ratio}");
        ["--setting".to_string(), format!("cache=adaptive,policy=fixed,{intervals}")]
    };
    let output = Command::new(env!("CARGO_BIN_EXE_dllm"))
        .args(["eval", "--model", &format!("{root}/models/tiny-math"), "--limit", "100", "--gen-length", "64"])
        .args(["--problems", &format!("{root}/models/tiny-math/eval/problems_0shot.jsonl"), "--json"])
        .args(ADAPTIVE.iter().flat_map(setting))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(rows.len(), ADAPTIVE.len());
    for (row, (.., accuracy)) in rows.iter().zip(ADAPTIVE) {
        println!("{row}");
        let got = row["accuracy"].as_f64().unwrap();
        assert!((got - accuracy).abs() <= 0.0101, "{row}: the original's accuracy is {accuracy}");
        assert_eq!((&row["problems"], row["nfe"].as_f64()), (&100.into(), Some(64.0)));
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "needs --release: minutes without optimisation")]
fn accuracy_is_the_original_s() {
    let root = env!("CARGO_MANIFEST_DIR");
    let output = Command::new(env!("CARGO_BIN_EXE_dllm"))
        .args(["eval", "--model", &format!("{root}/models/tiny-math"), "--limit", "100", "--gen-length", "64"])
        .args(["--problems", &format!("{root}/models/tiny-math/eval/problems_0shot.jsonl"), "--json"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    // cache, policy, accuracy and forwards per problem of the original
    let originals = [
        ("none", "fixed", 0.94, 64.0),
        ("none", "threshold", 0.78, 8.1),
        ("prefix", "fixed", 0.95, 64.0),
        ("prefix", "threshold", 0.83, 8.5),
        ("dual", "fixed", 0.95, 64.0),
        ("dual", "threshold", 0.83, 8.6),
    ];
    assert_eq!(rows.len(), originals.len());
    for (cache, policy, accuracy, nfe) in originals {
        let row = rows.iter().find(|r| {
            let setting = r["setting"].as_str().unwrap();
            setting.contains(&format!("cache={cache}")) && setting.contains(&format!("policy={policy}"))
        });
        let row = row.unwrap_or_else(|| panic!("no row for {cache}, {policy}"));
        println!("{row}");
        assert_eq!(row["problems"], 100);
        let got = row["accuracy"].as_f64().unwrap();
        assert!((got - accuracy).abs() <= 0.0101, "{cache}, {policy}: {got}, original {accuracy}");
        // The original's cached functions may run one useless forward per block (June revision); ours never.
        let got = row["nfe"].as_f64().unwrap();
        assert!(got <= nfe + 0.2 && got >= nfe - 2.0, "{cache}, {policy}: {got} forwards, original {nfe}");
    }
}
