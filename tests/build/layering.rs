//! Checks the structure of `src/`: which room may use which, circles between files, and the length of files and functions.
//!
//! A room is a directory or a file directly under `src/`. Calls go down this list:
//!
//! `bin > decode > engine > cache > model > backend > ops > gpu > abi`
//!
//! `sampling`, `tensor` and `error` are below all of them. [`broken_rule`] holds the exceptions. Paths are read from the
//! code: `use` trees, and paths inside expressions that begin with `crate`, `super`, `self`, the crate's name or a child
//! module. Comments, string literals and items under `#[cfg(test)]` are skipped. A name that the crate root re-exports
//! belongs to the room that it comes from.
//!
//! **Circles.** One file of a room depends on another when a path in it leads there. A name that is reached through a
//! module's imports or re-exports leads to the file that defines it, so a `mod.rs` that only declares and re-exports its
//! children is in no circle. Two edges are not counted: a re-export itself, and the use of an ancestor's own items by
//! a child module, which Rust's privacy is made for. Every other circle fails.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The rooms that call downwards, lowest first.
const ORDER: [&str; 9] = ["abi", "gpu", "ops", "backend", "model", "cache", "engine", "decode", "bin"];

/// Rooms outside the order; each has a rule of its own in [`broken_rule`].
const OTHERS: [&str; 7] = ["error", "tensor", "host_memory", "sampling", "reference", "selftest", "tokenizer"];

/// Lines of a file under `src/`, and of a function.
const MAX_FILE_LINES: usize = 500;
const MAX_FUNCTION_LINES: usize = 80;

/// Names and paths from the crate's root: `["model", "forward"]`. Those of binaries begin with `bin` and the binary's name.
type ModulePath = Vec<String>;

/// One identifier, number or mark of the code, and its line. `::` is one token.
#[derive(Clone, Debug, PartialEq)]
struct Token {
    line: usize,
    text: String,
}

/// One path in the code.
#[derive(Debug)]
struct Mention {
    line: usize,
    /// The module that contains it, with inline modules.
    module: ModulePath,
    /// Its segments as written; a `*` is the last.
    path: Vec<String>,
    import: Option<Import>,
}

/// A path that a `use` item binds to a name.
#[derive(Debug)]
struct Import {
    name: String,
    public: bool,
}

/// One source file without its tests.
struct Source {
    path: String,
    module: ModulePath,
    mentions: Vec<Mention>,
}

/// All source files, with what their modules contain.
struct Tree {
    sources: Vec<Source>,
    /// The file of each module, inline modules included.
    modules: BTreeMap<ModulePath, usize>,
    /// The full path of each imported name, by module and name.
    imports: BTreeMap<(ModulePath, String), ModulePath>,
}

/// Splits Rust code into tokens; drops comments, string and character literals, and lifetimes.
fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut found, mut line, mut i) = (Vec::new(), 1, 0);
    while i < chars.len() {
        let start = i;
        match at(i) {
            '/' if at(i + 1) == '/' => {
                while i < chars.len() && at(i) != '\n' {
                    i += 1;
                }
            }
            '/' if at(i + 1) == '*' => {
                let mut depth = 0;
                while i < chars.len() {
                    match (at(i), at(i + 1)) {
                        ('/', '*') => (depth, i) = (depth + 1, i + 2),
                        ('*', '/') => (depth, i) = (depth - 1, i + 2),
                        _ => i += 1,
                    }
                    if depth == 0 {
                        break;
                    }
                }
            }
            '"' => i = end_of_string(&chars, i),
            // A character literal; otherwise a lifetime.
            '\'' if at(i + 1) == '\\' => {
                i += 3;
                while i < chars.len() && at(i) != '\'' {
                    i += 1;
                }
                i += 1;
            }
            '\'' if at(i + 2) == '\'' => i += 3,
            '\'' => {
                i += 1;
                while is_word(at(i)) {
                    i += 1;
                }
            }
            ':' if at(i + 1) == ':' => {
                i += 2;
                found.push(Token { line, text: "::".into() });
            }
            c if is_word(c) => {
                while is_word(at(i)) {
                    i += 1;
                }
                let word: String = chars[start..i].iter().collect();
                let hashes = chars[i..].iter().take_while(|c| **c == '#').count();
                match (word.as_str(), at(i + hashes)) {
                    ("r" | "br" | "cr", '"') => i = end_of_raw_string(&chars, i + hashes + 1, hashes),
                    ("b" | "c", '"') if hashes == 0 => i = end_of_string(&chars, i),
                    ("b", '\'') if hashes == 0 => {}
                    // A raw identifier.
                    ("r", _) if hashes == 1 => i += 1,
                    _ => found.push(Token { line, text: word }),
                }
            }
            c => {
                i += 1;
                if !c.is_whitespace() {
                    found.push(Token { line, text: c.into() });
                }
            }
        }
        line += chars[start..i.min(chars.len())].iter().filter(|c| **c == '\n').count();
    }
    found
}

/// The index behind the string literal that opens at `open`.
fn end_of_string(chars: &[char], open: usize) -> usize {
    let mut i = open + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// The index behind the raw string literal whose text begins at `start`.
fn end_of_raw_string(chars: &[char], start: usize, hashes: usize) -> usize {
    let is_end =
        |i: &usize| chars[*i] == '"' && chars[*i + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes;
    (start..chars.len()).find(is_end).map_or(chars.len(), |i| i + 1 + hashes)
}

/// The index behind the group of brackets that opens at `open`.
fn end_of_group(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i + 1;
        }
    }
    tokens.len()
}

/// The index behind the item that begins at `start`: behind its `;` or its block.
fn end_of_item(tokens: &[Token], start: usize) -> usize {
    let mut i = start;
    while i < tokens.len() {
        match tokens[i].text.as_str() {
            ";" => return i + 1,
            "{" => return end_of_group(tokens, i),
            "(" | "[" => i = end_of_group(tokens, i),
            "}" => return i,
            _ => i += 1,
        }
    }
    i
}

/// Removes items under `#[cfg(test)]` or `#[cfg(all(test, ...))]`. Returns also the names of test modules in other files.
fn without_tests(tokens: Vec<Token>) -> (Vec<Token>, Vec<String>) {
    let (mut kept, mut modules, mut i) = (Vec::new(), Vec::new(), 0);
    while i < tokens.len() {
        let texts: Vec<&str> = tokens[i..].iter().take(3).map(|token| token.text.as_str()).collect();
        if texts != ["#", "[", "cfg"] {
            kept.push(tokens[i].clone());
            i += 1;
            continue;
        }
        let end = end_of_group(&tokens, i + 1);
        let has = |word: &str| tokens[i..end].iter().any(|token| token.text == word);
        if !has("test") || has("not") || has("any") {
            kept.extend_from_slice(&tokens[i..end]);
            i = end;
            continue;
        }
        let mut item = end;
        while tokens.get(item).is_some_and(|token| token.text == "#") {
            item = end_of_group(&tokens, item + 1);
        }
        i = end_of_item(&tokens, item);
        let words: Vec<&str> = tokens[item..i].iter().map(|token| token.text.as_str()).collect();
        if let [.., "mod", name, ";"] = words[..] {
            modules.push(name.to_string());
        }
    }
    (kept, modules)
}

/// The module of a file under `src/`.
fn module_of(path: &str) -> ModulePath {
    let inner = path.strip_prefix("src/").expect("a file under src/").trim_end_matches(".rs");
    let mut module: ModulePath = inner.split('/').map(str::to_string).collect();
    if matches!(module.last().map(String::as_str), Some("mod" | "lib" | "main")) {
        module.pop();
    }
    module
}

/// Reads the paths of one `use` tree, from behind `use` or a group's opening brace. Returns the index behind it.
fn read_use_tree(
    tokens: &[Token],
    start: usize,
    prefix: &[String],
    found: &mut Vec<(usize, ModulePath, String)>,
) -> usize {
    let (mut path, mut i) = (prefix.to_vec(), start);
    let mut line = tokens.get(i).map_or(0, |token| token.line);
    let mut name = None;
    while i < tokens.len() {
        match tokens[i].text.as_str() {
            "{" => {
                i += 1;
                while i < tokens.len() && tokens[i].text != "}" {
                    i = read_use_tree(tokens, i, &path, found);
                    i += usize::from(tokens.get(i).is_some_and(|token| token.text == ","));
                }
                return i + 1;
            }
            "::" => i += 1,
            "as" => {
                name = tokens.get(i + 1).map(|token| token.text.clone());
                i += 2;
            }
            "," | ";" | "}" => break,
            word => {
                line = tokens[i].line;
                if word != "self" || path.is_empty() {
                    path.push(word.to_string());
                }
                i += 1;
            }
        }
    }
    if let Some(last) = path.last().cloned() {
        found.push((line, path, name.unwrap_or(last)));
    }
    i
}

/// Reads the paths of a file's code, and its inline modules.
fn mentions(tokens: &[Token], module: &ModulePath) -> (Vec<Mention>, Vec<ModulePath>) {
    let text = |i: usize| tokens.get(i).map_or("", |token| token.text.as_str());
    let is_name = |i: usize| text(i).starts_with(|c: char| c.is_alphabetic() || c == '_');
    let (mut found, mut inline, mut open, mut depth, mut i) = (Vec::new(), Vec::new(), Vec::new(), 0, 0);
    let mut module = module.clone();
    while i < tokens.len() {
        let line = tokens[i].line;
        match text(i) {
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                if open.last() == Some(&depth) {
                    open.pop();
                    module.pop();
                }
            }
            "mod" if text(i + 2) == "{" => {
                open.push(depth);
                module.push(text(i + 1).to_string());
                inline.push(module.clone());
            }
            "use" if text(i + 1) != "<" => {
                let public = i > 0 && matches!(text(i - 1), "pub" | ")");
                let mut paths = Vec::new();
                i = read_use_tree(tokens, i + 1, &[], &mut paths);
                found.extend(paths.into_iter().map(|(line, path, name)| {
                    let import = Some(Import { name, public });
                    Mention { line, module: module.clone(), path, import }
                }));
                continue;
            }
            _ if is_name(i) && text(i + 1) == "::" && (i == 0 || text(i - 1) != "::") => {
                let mut path = vec![text(i).to_string()];
                while text(i + 1) == "::" && is_name(i + 2) {
                    i += 2;
                    path.push(text(i).to_string());
                }
                found.push(Mention { line, module: module.clone(), path, import: None });
            }
            _ => {}
        }
        i += 1;
    }
    (found, inline)
}

impl Tree {
    /// Reads source files, given as path from the repository's root and text.
    fn read(files: &[(String, String)]) -> Tree {
        let mut read: Vec<(Source, Vec<ModulePath>)> = Vec::new();
        let mut tests: Vec<ModulePath> = Vec::new();
        for (path, text) in files {
            let module = module_of(path);
            let (code, test_modules) = without_tests(tokens(text));
            tests.extend(test_modules.into_iter().map(|name| [module.clone(), vec![name]].concat()));
            let (mentions, inline) = mentions(&code, &module);
            read.push((Source { path: path.clone(), module, mentions }, inline));
        }
        read.retain(|(source, _)| !tests.iter().any(|test| source.module.starts_with(test)));
        let mut tree = Tree { sources: Vec::new(), modules: BTreeMap::new(), imports: BTreeMap::new() };
        for (i, (source, inline)) in read.into_iter().enumerate() {
            tree.modules.insert(source.module.clone(), i);
            tree.modules.extend(inline.into_iter().map(|module| (module, i)));
            tree.sources.push(source);
        }
        let mut imports = BTreeMap::new();
        for mention in tree.sources.iter().flat_map(|source| &source.mentions) {
            if let (Some(import), Some(full)) = (&mention.import, tree.full_path(mention)) {
                imports.insert((mention.module.clone(), import.name.clone()), full);
            }
        }
        tree.imports = imports;
        tree
    }

    /// The path from the crate's root, as written; None when it leads to another crate or to a local name.
    fn full_path(&self, mention: &Mention) -> Option<ModulePath> {
        let mut base = mention.module.clone();
        let mut rest = &mention.path[..];
        match rest[0].as_str() {
            "crate" => {
                base.truncate(if base.first().is_some_and(|room| room == "bin") { 2 } else { 0 });
                rest = &rest[1..];
            }
            "dllm_kernels" => {
                base.clear();
                rest = &rest[1..];
            }
            "self" => rest = &rest[1..],
            "super" => {}
            child => {
                let module = [base.clone(), vec![child.to_string()]].concat();
                if !self.modules.contains_key(&module) {
                    return None;
                }
            }
        }
        while rest.first().is_some_and(|segment| segment == "super") {
            base.pop();
            rest = &rest[1..];
        }
        Some([base, rest.to_vec()].concat())
    }

    /// Replaces a name that the crate's root re-exports by the path behind it.
    fn behind_root(&self, path: ModulePath) -> ModulePath {
        let first = path.first().cloned().unwrap_or_default();
        let import = self.imports.get(&(Vec::new(), first));
        import.map_or(path.clone(), |full| [full.clone(), path[1..].to_vec()].concat())
    }

    /// The file that defines what a full path leads to, behind imports and re-exports.
    fn defining_file(&self, path: &ModulePath) -> Option<usize> {
        let mut path = path.clone();
        // Each round follows one import; a chain is short.
        for _ in 0..8 {
            let split = (0..=path.len()).rev().find(|len| self.modules.contains_key(&path[..*len]))?;
            let (module, rest) = path.split_at(split);
            let import = rest.first().and_then(|name| self.imports.get(&(module.to_vec(), name.clone())));
            let Some(full) = import else {
                return self.modules.get(module).copied();
            };
            path = [full.clone(), rest[1..].to_vec()].concat();
        }
        None
    }

    /// One message for each path that goes in a direction that is not allowed.
    fn wrong_directions(&self) -> Vec<String> {
        let mut found = BTreeSet::new();
        for (source, mention) in self.sources.iter().flat_map(|s| s.mentions.iter().map(move |m| (s, m))) {
            let Some(target) = self.full_path(mention).map(|path| self.behind_root(path)) else { continue };
            let mut rooms = self.modules.keys().filter_map(|module| module.first());
            if source.module.is_empty() || !target.first().is_some_and(|room| rooms.any(|known| known == room)) {
                continue;
            }
            if let Some((rule, way_out)) = broken_rule(&source.path, &source.module, &target) {
                let (path, line) = (&source.path, mention.line);
                found.insert((path, line, format!("{path}:{line}: `{}`: {rule}. {way_out}", target.join("::"))));
            }
        }
        found.into_iter().map(|(_, _, message)| message).collect()
    }

    /// One message for each circle of files in one room.
    fn circles(&self) -> Vec<String> {
        let mut edges: BTreeMap<usize, BTreeMap<usize, usize>> = BTreeMap::new();
        for (i, source) in self.sources.iter().enumerate() {
            for mention in source.mentions.iter().filter(|m| !m.import.as_ref().is_some_and(|import| import.public)) {
                let Some(to) = self.full_path(mention).and_then(|path| self.defining_file(&path)) else { continue };
                let target = &self.sources[to].module;
                let same_room = source.module.first() == target.first();
                if same_room && !source.module.starts_with(target) {
                    edges.entry(i).or_default().entry(to).or_insert(mention.line);
                }
            }
        }
        let reachable = |from: usize| {
            let (mut seen, mut left) = (BTreeSet::new(), vec![from]);
            while let Some(next) = left.pop() {
                left.extend(edges.get(&next).into_iter().flat_map(|to| to.keys()).filter(|to| seen.insert(**to)));
            }
            seen
        };
        let reached: Vec<BTreeSet<usize>> = (0..self.sources.len()).map(reachable).collect();
        let mut circles = BTreeSet::new();
        for (i, files) in reached.iter().enumerate() {
            let circle: Vec<usize> = files.iter().copied().filter(|j| reached[*j].contains(&i)).collect();
            if circle.contains(&i) {
                circles.insert(circle);
            }
        }
        circles.iter().map(|circle| self.describe_circle(circle, &edges)).collect()
    }

    fn describe_circle(&self, circle: &[usize], edges: &BTreeMap<usize, BTreeMap<usize, usize>>) -> String {
        let mut message = "these files use each other. Move what they share to a file below them, or an `impl` block to the upper file:".to_string();
        for from in circle {
            for (to, line) in edges[from].iter().filter(|(to, _)| circle.contains(to)) {
                message += &format!("\n    {}:{line} uses {}", self.sources[*from].path, self.sources[*to].path);
            }
        }
        message
    }
}

/// Returns the rule that a path from a file to `target` breaks, and the way out.
fn broken_rule(file: &str, module: &[String], target: &[String]) -> Option<(&'static str, &'static str)> {
    let (from, to) = (module[0].as_str(), target[0].as_str());
    // The command line is a crate of its own and the top of the order: doctor, bench, machine and inspect use the kernels,
    // the backends and the reference directly. Nothing is forbidden to it.
    if from == to || from == "bin" {
        return None;
    }
    for room in [from, to] {
        if !ORDER.contains(&room) && !OTHERS.contains(&room) {
            return Some((
                "a room without a place in the order",
                "Give it one in tests/build/layering.rs and docs/architecture.md",
            ));
        }
    }
    let rank = |room: &str| ORDER.iter().position(|name| *name == room);
    match (from, to) {
        ("error", _) => {
            Some(("`error` uses no other room", "Move the type to `error` or the conversion to the other room"))
        }
        (_, "error") => None,
        ("tensor" | "host_memory", _) => {
            Some(("`tensor` and `host_memory` use `error` only", "Move the function to the room that it needs"))
        }
        ("sampling", _) => Some(("`sampling` uses `error` only", "Pass plain values, or move the type to `sampling`")),
        ("tokenizer", _) => Some(("`tokenizer` uses `error` only", "Pass token ids or text")),
        (_, "tokenizer") if file.starts_with("src/decode/observer") => None,
        (_, "tokenizer") => {
            Some(("`tokenizer` is used by `bin` and the observers of `decode` only", "Decode works on token ids"))
        }
        ("selftest", "reference" | "ops" | "gpu" | "abi" | "sampling") => None,
        ("selftest", _) => Some((
            "`selftest` uses `reference`, `ops`, `gpu`, `abi`, `sampling` and `error`",
            "A case is one op: test more of the engine in tests/",
        )),
        (_, "selftest") => Some((
            "`selftest` is for `doctor`, benches and tests",
            "Move what ships a result to the room that needs it",
        )),
        (_, "reference") => Some((
            "`reference` is for tests, `doctor` and selftest",
            "Move what ships a result to `sampling` or `backend/cpu`",
        )),
        ("reference", "sampling" | "tensor") => None,
        ("reference", "backend") if !matches!(target.get(1).map(String::as_str), Some("cpu" | "cuda" | "Backend")) => {
            None
        }
        ("reference", _) => {
            Some(("`reference` uses `sampling`, `tensor` and the plain types of `backend`", "Write the definition out"))
        }
        (_, "sampling" | "tensor" | "host_memory") => None,
        _ if rank(to) > rank(from) => Some(("calls go down only", "Move the type down, or pass what it is needed for")),
        ("decode", "backend" | "ops" | "gpu" | "abi") => Some((
            "nothing above `engine` uses `backend`, `ops`, `gpu` or `abi`",
            "Let `engine` offer it, or let a room between re-export the type",
        )),
        ("engine", "gpu") => None,
        ("engine" | "cache" | "model", "ops" | "gpu" | "abi") => Some((
            "nothing above `backend` uses `ops`, `gpu` or `abi`, but `engine` uses `gpu`",
            "Move the launch to `backend/cuda`, or let the backend offer what is needed",
        )),
        ("cache" | "model", "backend") if matches!(target.get(1).map(String::as_str), Some("cpu" | "cuda")) => Some((
            "`model` and `cache` name no concrete backend",
            "Write it over the trait `Backend`, or move it to `engine` or into the backend",
        )),
        ("backend", "ops" | "gpu" | "abi") if !file.starts_with("src/backend/cuda") => {
            Some(("only `backend/cuda` uses `ops`, `gpu` and `abi`", "Move it to `src/backend/cuda/`"))
        }
        _ => None,
    }
}

/// One message for each file above [`MAX_FILE_LINES`] and each function above [`MAX_FUNCTION_LINES`], tests included.
fn too_long(files: &[(String, String)]) -> Vec<String> {
    let mut found = Vec::new();
    for (path, text) in files {
        let lines = text.lines().count();
        if lines > MAX_FILE_LINES && path != "src/abi.rs" {
            found.push(format!("{path}: {lines} lines of at most {MAX_FILE_LINES}. Split it by subject"));
        }
        let tokens = tokens(text);
        for (i, pair) in tokens.windows(2).enumerate() {
            if pair[0].text != "fn" || !pair[1].text.starts_with(|c: char| c.is_alphabetic() || c == '_') {
                continue;
            }
            let end = end_of_item(&tokens, i);
            let (name, line, last) = (&pair[1].text, pair[0].line, tokens[end - 1].line);
            if last + 1 - line > MAX_FUNCTION_LINES {
                let lines = last + 1 - line;
                found.push(format!(
                    "{path}:{line}: `{name}`: {lines} lines of at most {MAX_FUNCTION_LINES}. Split it by step"
                ));
            }
        }
    }
    found
}

/// All Rust files under `src/`.
fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut found, mut left) = (Vec::new(), vec![root.join("src")]);
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    assert!(found.len() > 50, "only {} files under {}", found.len(), root.display());
    found
}

fn check(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}, {} found:\n{}", found.len(), found.join("\n"));
}

#[test]
fn calls_go_down() {
    check("paths in a direction that is not allowed", &Tree::read(&sources()).wrong_directions());
}

#[test]
fn rooms_have_no_circles() {
    check("circles between files", &Tree::read(&sources()).circles());
}

#[test]
fn files_and_functions_are_short() {
    check("files and functions that are too long", &too_long(&sources()));
}

/// A tree of made-up files.
fn tree(files: &[(&str, &str)]) -> Tree {
    Tree::read(&files.iter().map(|(path, text)| (path.to_string(), text.to_string())).collect::<Vec<_>>())
}

/// The wrong directions of one made-up file next to some that have a module for each room.
fn directions(path: &str, text: &str) -> Vec<String> {
    let lib = "pub use decode::{Generator, Options};\npub use error::{Error, Result};";
    let mut files = vec![("src/lib.rs", lib), (path, text)];
    let rooms: Vec<String> = ORDER.iter().chain(&OTHERS).map(|room| format!("src/{room}/mod.rs")).collect();
    files.extend(rooms.iter().map(|path| (path.as_str(), "")).filter(|(room, _)| *room != path));
    tree(&files).wrong_directions()
}

#[track_caller]
fn finds_one(found: &[String], parts: &[&str]) {
    assert!(found.len() == 1, "expected one message, found {found:#?}");
    for part in parts {
        assert!(found[0].contains(part), "`{part}` is not in: {}", found[0]);
    }
}

#[test]
fn finds_upward_paths() {
    let upward = ["src/model/forward.rs:2:", "`decode", "calls go down only", "Move the type down"];
    finds_one(&directions("src/model/forward.rs", "\nuse crate::decode::Policy;"), &upward);
    finds_one(&directions("src/model/forward.rs", "\nuse crate::{error::Error, decode::{self}};"), &upward[1..3]);
    finds_one(&directions("src/model/forward.rs", "\npub(crate) use super::super::decode::*;"), &upward);
    finds_one(&directions("src/model/forward.rs", "\nfn f() -> crate::decode::Policy { g() }"), &upward);
    finds_one(&directions("src/model/forward.rs", "mod inner {\nuse super::super::super::decode::Policy;\n}"), &upward);
    // A name of the crate's root belongs to the room that it comes from.
    finds_one(&directions("src/model/forward.rs", "\nuse crate::Generator;"), &upward);
    check("names of `error`", &directions("src/model/forward.rs", "use crate::{Error, Result};"));
}

#[test]
fn knows_the_exceptions() {
    let allowed = [
        (
            "src/decode/options.rs",
            "use crate::engine::Model; use crate::cache::X; use crate::model::Y; use crate::sampling::Z;",
        ),
        ("src/decode/observer.rs", "use crate::tokenizer::Tokenizer;"),
        ("src/engine/cuda/mod.rs", "use crate::gpu::Stream; use crate::backend::cuda::Cuda;"),
        ("src/model/session.rs", "use crate::backend::{Backend, SequenceRows}; use crate::tensor::Tensor;"),
        ("src/backend/cuda/rows.rs", "use crate::{abi, gpu::Buffer, ops};"),
        ("src/ops/unmask.rs", "use crate::sampling::Confidence; use crate::gpu::Device; use crate::abi::*;"),
        ("src/selftest/norm.rs", "use crate::{reference::norm, ops, gpu::Stream, abi::*, sampling::Confidence};"),
        ("src/reference/attention.rs", "use crate::backend::SequenceRows; use crate::sampling::Candidates;"),
        (
            "src/bin/dllm/doctor.rs",
            "use dllm_kernels::{ops, gpu, abi, reference}; use dllm_kernels::backend::cpu::attention;",
        ),
    ];
    for (path, text) in allowed {
        check(path, &directions(path, text));
    }
    let forbidden = [
        ("src/decode/options.rs", "use crate::backend::Ratio;", "nothing above `engine`"),
        ("src/decode/generate.rs", "use crate::tokenizer::Tokenizer;", "observers of `decode`"),
        ("src/engine/cuda/run.rs", "use crate::ops;", "nothing above `backend`"),
        ("src/engine/cuda/run.rs", "use crate::abi::dllm_progress;", "nothing above `backend`"),
        ("src/model/session.rs", "impl Session<'_, crate::backend::cuda::Cuda> {}", "no concrete backend"),
        ("src/cache/mod.rs", "use crate::backend::cpu;", "no concrete backend"),
        ("src/backend/cpu/linear.rs", "use crate::gpu::Device;", "only `backend/cuda`"),
        ("src/backend/cpu/norm.rs", "use crate::reference::norm;", "`reference` is for tests"),
        ("src/ops/norm.rs", "use crate::selftest::Random;", "`selftest` is for"),
        ("src/selftest/norm.rs", "use crate::backend::cuda::Cuda;", "`selftest` uses"),
        ("src/ops/rope.rs", "use crate::reference::rope::Angles;", "`reference` is for tests"),
        ("src/reference/attention.rs", "use crate::backend::cpu::attention;", "`reference` uses"),
        ("src/sampling/sampler.rs", "use crate::tensor::Tensor;", "`sampling` uses"),
        ("src/tokenizer/chat.rs", "use crate::model::Config;", "`tokenizer` uses"),
        ("src/tensor.rs", "use crate::model::Config;", "`tensor` and `host_memory` use"),
        ("src/host_memory.rs", "use crate::tensor::Tensor;", "`tensor` and `host_memory` use"),
        ("src/error.rs", "use crate::sampling::Confidence;", "`error` uses"),
        ("src/ops/mod.rs", "use crate::backend::Heads;", "calls go down only"),
        ("src/attic/mod.rs", "use crate::error::Error;", "without a place in the order"),
    ];
    for (path, text, rule) in forbidden {
        finds_one(&directions(path, text), &[path, rule]);
    }
}

#[test]
fn skips_comments_strings_and_tests() {
    let code = r##"
        // use crate::decode::Policy;
        /* use crate::decode::Policy; /* nested */ use crate::decode::Policy; */
        /// Called by [`crate::decode::decode`].
        const TEXT: &str = "use crate::decode::Policy; \" crate::decode";
        const RAW: &[u8] = br#"a " crate::decode::Policy"#;
        fn quote<'a>(c: char, text: &'a str) -> bool { c == '"' || c == '\'' || text == "crate::decode::x" }
        #[cfg(test)]
        use crate::decode::Policy;
        #[cfg(all(test, unix))]
        #[allow(dead_code)]
        fn only_in_tests(x: [u8; 2]) { crate::decode::decode(x); }
        #[cfg(test)]
        mod tests { use crate::decode::*; mod more { fn f() { crate::decode::g(); } } }
    "##;
    check("no path outside tests", &directions("src/model/forward.rs", code));
    let after = format!("{code}\nuse crate::decode::Policy;");
    finds_one(&directions("src/model/forward.rs", &after), &["src/model/forward.rs:16:"]);
    finds_one(&directions("src/model/forward.rs", "#[cfg(not(test))]\nuse crate::decode::Policy;"), &[":2:"]);
    // Test modules in files of their own.
    let files = [("src/decode/mod.rs", ""), ("src/ops/attention/tests.rs", "use crate::decode::Policy;")];
    let declared = ("src/ops/attention.rs", "#[cfg(test)]\nmod tests;");
    check("a test module", &tree(&[files[0], files[1], declared]).wrong_directions());
    finds_one(
        &tree(&[files[0], files[1], ("src/ops/attention.rs", "mod tests;")]).wrong_directions(),
        &["tests.rs:1:"],
    );
}

#[test]
fn finds_circles() {
    let root = ("src/model/mod.rs", "mod course; mod forward; mod sizes; mod resident; pub use course::DeviceLoop;");
    let sizes = ("src/model/sizes.rs", "pub struct Widths;\nfn f() { super::resident::memory(); }");
    let circle = tree(&[
        root,
        ("src/model/course.rs", "use super::forward::CachePlan;\npub struct DeviceLoop;"),
        // Through the re-export of the parent.
        ("src/model/forward.rs", "use super::DeviceLoop;\nuse super::sizes::Widths;\npub struct CachePlan;"),
        sizes,
        ("src/model/resident.rs", "use crate::model::course::DeviceLoop;\npub fn memory() {}"),
        ("src/model/names.rs", "use super::forward::CachePlan;"),
    ]);
    let uses = |from: &str, to: &str| format!("src/model/{from} uses src/model/{to}.rs");
    let edges = [
        uses("course.rs:1", "forward"),
        uses("forward.rs:1", "course"),
        uses("forward.rs:2", "sizes"),
        uses("sizes.rs:2", "resident"),
        uses("resident.rs:1", "course"),
    ];
    finds_one(&circle.circles(), &edges.each_ref().map(String::as_str));
    assert!(!circle.circles()[0].contains("names.rs"), "names.rs is in no circle");

    // The parent's private use of a child, and the child's use of a sibling that uses the parent's child.
    let pair = [("src/gpu/a.rs", "use super::b::B;"), ("src/gpu/b.rs", "use crate::gpu::a;")];
    finds_one(&tree(&pair).circles(), &["src/gpu/a.rs:1 uses src/gpu/b.rs", "src/gpu/b.rs:1 uses src/gpu/a.rs"]);
}

#[test]
fn parents_may_declare_and_share() {
    // A parent that re-exports its children and has items that they use; a path that only tests use; a chain.
    let none = tree(&[
        (
            "src/gpu/mod.rs",
            "mod buffer; mod stream; pub use buffer::Buffer; pub use stream::Stream; pub type Outcome = ();",
        ),
        ("src/gpu/buffer.rs", "use super::{Outcome, Stream};"),
        ("src/gpu/stream.rs", "use super::Outcome;\n#[cfg(test)]\nmod tests { use super::super::Buffer; }"),
    ]);
    check("a chain", &none.circles());
}

#[test]
fn finds_long_files_and_functions() {
    let long = |path: &str, text: String| too_long(&[(path.to_string(), text)]);
    let body =
        |lines: usize| format!("\nfn long(x: [u8; 2]) -> usize {{\n{}}}\nfn short() {{}}\n", "x;\n".repeat(lines));
    check("80 lines", &long("src/a.rs", body(78)));
    finds_one(&long("src/a.rs", body(79)), &["src/a.rs:2: `long`: 81 lines"]);
    check("brackets in literals", &long("src/a.rs", format!("fn f() {{ '{{'; \"{{\" }}\n{}", "\n".repeat(90))));
    check("500 lines", &long("src/a.rs", "\n".repeat(500)));
    finds_one(&long("src/a.rs", "\n".repeat(501)), &["src/a.rs: 501 lines"]);
    check("the C structs", &long("src/abi.rs", "\n".repeat(501)));
}
