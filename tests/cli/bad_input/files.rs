use super::*;

#[test]
fn no_directory() {
    refused(Model::open("/no/such/place"), "Io", &["/no/such/place", "no such checkpoint directory"]);
}

#[test]
fn a_file_instead_of_a_directory() {
    let dir = Checkpoint::llada().write();
    refused(Model::open(dir.path().join(FILE)), "Io", &[FILE, "not a directory"]);
}

#[test]
fn no_config() {
    let dir = Checkpoint::llada().write();
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    refused(Model::open(dir.path()), "Io", &["config.json", "No such file"]);
}

#[test]
fn no_safetensors() {
    let dir = Checkpoint::llada().write();
    std::fs::rename(dir.path().join(FILE), dir.path().join("pytorch_model.bin")).unwrap();
    refused(Model::open(dir.path()), "Format", &[dir.path().to_str().unwrap(), "no model*.safetensors"]);
}

/// Directories and endless devices in place of files.
#[test]
#[cfg(unix)]
fn no_files() {
    let dir = Checkpoint::llada().write();
    let replace = |name: &str, target: &str| {
        let path = dir.path().join(name);
        let _ = std::fs::remove_file(&path).or_else(|_| std::fs::remove_dir(&path));
        match target {
            "" => std::fs::create_dir(path).unwrap(),
            target => std::os::unix::fs::symlink(target, path).unwrap(),
        }
    };
    for target in ["", "/dev/zero", "/dev/null"] {
        replace(FILE, target);
        refused(Model::open(dir.path()), "Format", &["no model*.safetensors here"]);
    }
    for target in ["", "/dev/zero", "/dev/null"] {
        replace("config.json", target);
        refused(Model::open(dir.path()), "Format", &["config.json", "expected a file"]);
    }
}
