//! Reference implementation Fast-dLLM, timed by `benches/originals.py` in the user's Python environment.

use super::{Mode, Setup, Source};
use crate::machine::Device;
use crate::output::interrupted;
use dllm_kernels::Family;
use dllm_kernels::decode::Policy;
use serde::Deserialize;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

const SCRIPT: &str = include_str!("../../../../benches/originals.py");

/// Time limit of all rounds of the reference implementation.
const TIME_LIMIT: Duration = Duration::from_secs(20 * 60);

/// Answer of the script.
#[derive(Clone, Debug, Deserialize)]
pub struct Answer {
    pub torch: String,
    pub revision: Option<String>,
    pub modes: Vec<Row>,
}

/// One mode of an [`Answer`].
#[derive(Clone, Debug, Deserialize)]
pub struct Row {
    pub name: String,
    pub nfe: usize,
    pub seconds: Vec<f64>,
}

/// Python interpreter and the request for one round of all modes.
pub struct Originals {
    python: OsString,
    request: Value,
    /// Time spent in its rounds so far.
    spent: Duration,
}

impl Originals {
    /// Finds the reference implementation named by `DLLM_ORIGINALS`.
    ///
    /// # Errors
    /// The reason why it is not measured.
    pub fn find(setup: &Setup) -> Result<Originals, String> {
        let folder = std::env::var_os("DLLM_ORIGINALS").filter(|v| !v.is_empty());
        let folder = folder.ok_or("not measured (DLLM_ORIGINALS is not set)")?;
        if setup.batch > 1 {
            return Err("not measured: the reference implementation decodes one sequence at a time".into());
        }
        if setup.config.family != Family::Llada {
            return Err(format!(
                "not measured: the script runs Fast-dLLM for LLaDA only, not for {}",
                setup.config.family
            ));
        }
        if setup.modes.iter().all(|mode| !is_theirs(*mode)) {
            return Err("not measured: the script runs vanilla and Fast-dLLM's modes only".into());
        }
        let python = std::env::var_os("DLLM_PYTHON").filter(|v| !v.is_empty()).unwrap_or("python3".into());
        let request = request(setup, &folder.to_string_lossy());
        Ok(Originals { python, request, spent: Duration::ZERO })
    }

    /// Decodes once in every mode, in a new process.
    ///
    /// # Errors
    /// A message when the process fails, exceeds the time limit or gives no valid answer.
    pub fn round(&mut self) -> Result<Answer, String> {
        let start = Instant::now();
        let answer = run(&self.python, &self.request, start + TIME_LIMIT.saturating_sub(self.spent))?;
        self.spent += start.elapsed();
        let answer: Answer = serde_json::from_str(&answer)
            .map_err(|e| format!("expected an answer of benches/originals.py, found {e}"))?;
        let requested = self.request["modes"].as_array().map_or(0, Vec::len);
        let valid = |row: &Row| row.nfe > 0 && !row.seconds.is_empty() && row.seconds.iter().all(|s| *s > 0.0);
        if answer.modes.len() == requested && answer.modes.iter().all(valid) {
            Ok(answer)
        } else {
            Err(format!("expected forwards and times of {requested} modes, found fewer"))
        }
    }
}

/// Returns whether the script runs this mode.
fn is_theirs(mode: Mode) -> bool {
    !matches!(mode, Mode::Adaptive | Mode::DualJoined)
}

fn request(setup: &Setup, folder: &str) -> Value {
    let config = &setup.config;
    let modes = setup.modes.iter().filter(|mode| is_theirs(**mode)).map(|mode| (mode, mode.options(setup)));
    let modes = modes.map(|(mode, options)| {
        let mut fields = json!({ "name": mode.name(), "cache": options.cache.name(), "steps": options.steps() });
        fields["policy"] = options.policy.name().into();
        match options.policy {
            Policy::Threshold(threshold) => fields["threshold"] = threshold.into(),
            Policy::Factor(factor) => fields["factor"] = factor.into(),
            _ => {}
        }
        fields
    });
    json!({
        "originals": folder,
        "threads": setup.threads,
        "device": match setup.device {
            Device::Cpu => "cpu".to_string(),
            Device::Cuda(n) => format!("cuda:{n}"),
        },
        "checkpoint": match &setup.source {
            Source::Checkpoint(dir) => dir.to_string_lossy().into(),
            Source::Random(_) => Value::Null,
        },
        "shape": {
            "d_model": config.d_model,
            "n_heads": config.num_heads,
            "n_kv_heads": config.num_kv_heads,
            "n_layers": config.num_layers,
            "mlp_hidden_size": config.mlp_hidden_size,
            "vocab_size": config.vocab_size,
            "rope_theta": config.rope_theta,
            "rms_norm_eps": config.rms_norm_eps,
            "max_sequence_length": config.max_sequence_length,
            "mask_token_id": config.mask_token_id,
        },
        "prompt": setup.prompt,
        "gen_length": setup.gen_length,
        "block_length": setup.block_length,
        "repeat": 1,
        "modes": modes.collect::<Vec<_>>(),
    })
}

/// Runs the script. Returns the last line of its stdout.
///
/// # Errors
/// The last line of its stderr, or the reason of the failure.
fn run(python: &OsString, request: &Value, deadline: Instant) -> Result<String, String> {
    let name = python.to_string_lossy();
    let mut child = Command::new(python)
        .args(["-c", SCRIPT])
        .env("PYTHONSAFEPATH", "1") // do not import a torch.py of the current directory
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{name}: {e}"))?;
    // Threads serve the pipes, so that a full pipe cannot block: the child may never read, or write too much.
    if let Some(mut stdin) = child.stdin.take() {
        let request = request.to_string();
        std::thread::spawn(move || drop(stdin.write_all(request.as_bytes())));
    }
    let stdout = last_line(child.stdout.take());
    let stderr = last_line(child.stderr.take());
    let status = wait(&mut child, deadline)?;
    // A grandchild may keep the pipes open, but all output of the child has arrived by now.
    let line = |from: Receiver<String>| from.recv_timeout(Duration::from_secs(5)).unwrap_or_default();
    match (status.success(), line(stdout)) {
        (true, answer) if !answer.is_empty() => Ok(answer),
        (true, _) => Err(format!("{name}: expected an answer on stdout, found none")),
        (false, _) => match line(stderr) {
            message if message.is_empty() => Err(format!("{name}: {status}")),
            message => Err(message),
        },
    }
}

/// Returns a channel that receives the last line that is not blank, at the end of the stream.
fn last_line(stream: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut last = String::new();
        let mut reader = stream.map(BufReader::new);
        let mut line = Vec::new();
        while let Some(reader) = &mut reader {
            line.clear();
            match reader.read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => break,
                Ok(_) if line.iter().all(u8::is_ascii_whitespace) => {}
                Ok(_) => last = String::from_utf8_lossy(&line).trim().to_string(),
            }
        }
        let _ = sender.send(last);
    });
    receiver
}

fn wait(child: &mut Child, deadline: Instant) -> Result<std::process::ExitStatus, String> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if Instant::now() < deadline && !interrupted() => std::thread::sleep(Duration::from_millis(20)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                let minutes = TIME_LIMIT.as_secs() / 60;
                return Err(if interrupted() {
                    "interrupted".into()
                } else {
                    format!("no answer within {minutes} minutes")
                });
            }
            Err(e) => {
                let _ = child.kill();
                return Err(e.to_string());
            }
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// Interpreter that ignores its arguments and runs `script`.
    fn fake(script: &str) -> (tempfile::TempDir, OsString) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("python");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        (dir, path.into())
    }

    fn answer(script: &str, limit: Duration) -> Result<String, String> {
        let (_dir, python) = fake(script);
        // Longer than a pipe holds.
        run(&python, &json!({ "prompt": vec![7; 100_000] }), Instant::now() + limit)
    }

    #[test]
    fn takes_the_last_line() {
        let long = Duration::from_secs(60);
        assert_eq!(answer("cat >/dev/null; echo noise; echo '{\"a\": 1}'; echo", long).unwrap(), "{\"a\": 1}");
        assert_eq!(answer("echo unread", long).unwrap(), "unread");
    }

    #[test]
    fn says_why_it_failed() {
        let long = Duration::from_secs(60);
        assert_eq!(answer("echo first >&2; echo 'ValueError: no' >&2; exit 1", long).unwrap_err(), "ValueError: no");
        assert!(answer("exit 3", long).unwrap_err().contains('3'));
        assert!(answer("exit 0", long).unwrap_err().contains("found none"));
        let missing = run(&"/no/such/python".into(), &Value::Null, Instant::now() + long).unwrap_err();
        assert!(missing.starts_with("/no/such/python: "), "{missing}");
    }

    #[test]
    fn does_not_wait_for_ever() {
        let start = Instant::now();
        let error = answer("exec sleep 600", Duration::from_millis(200)).unwrap_err();
        assert!(error.contains("no answer within"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(60));
    }
}
