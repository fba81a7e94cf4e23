//! What no run on the software device can show, read in the PTX that ships: where blocks hand results to each other, and
//! what the text of every module must and must not hold.
//!
//! A kernel whose blocks count themselves with a global atomic must
//! - before it counts, wait for all threads of the block and then fence for the whole device, in the thread that counts: in
//!   that order its fence speaks for what all of them stored;
//! - fence again in that thread after the count, and wait once more before anything is read;
//! - read what other blocks wrote past the L1 cache, which is not coherent.
//!
//! A kernel that tells the host something must do so after a barrier of its block, then fence for the whole system, and only
//! then store the word that the host waits for, as the last thing that it stores.
#![cfg(feature = "cuda")]

use dllm_kernels::abi::{dllm_progress, dllm_unmask_params, dllm_vverify_params};
use dllm_kernels::gpu::Module;
use std::collections::{BTreeMap, BTreeSet};
use std::mem::offset_of;

/// A kernel's name, parameters and instructions; labels keep their colon, everything else is without its semicolon.
struct Entry<'a> {
    name: &'a str,
    lines: Vec<&'a str>,
}

/// The kernels of a module.
fn entries(ptx: &str) -> Vec<Entry<'_>> {
    let parts = ptx.split(".entry ").skip(1);
    parts
        .map(|part| Entry {
            name: part.split('(').next().unwrap(),
            lines: part
                .lines()
                .skip_while(|line| *line != "{")
                .take_while(|line| *line != "}")
                .map(|line| line.split("//").next().unwrap().trim().trim_end_matches(';'))
                .filter(|line| !line.is_empty())
                .collect(),
        })
        .collect()
}

/// The instruction of a line, without the predicate before it.
fn instruction(line: &str) -> &str {
    match line.strip_prefix('@') {
        Some(line) => line.split_once(' ').map_or("", |(_, rest)| rest),
        None => line,
    }
}

fn opcode(line: &str) -> &str {
    instruction(line).split_whitespace().next().unwrap_or("")
}

/// The registers and names of a line, after its opcode.
fn operands(line: &str) -> impl Iterator<Item = &str> {
    let rest = instruction(line).split_once(char::is_whitespace).map_or("", |(_, rest)| rest);
    rest.split([',', ' ', '\t', '{', '}', '[', ']', '+', ';']).filter(|operand| !operand.is_empty())
}

fn is_fence(line: &str) -> bool {
    ["membar.gl", "membar.sys", "fence.acq_rel.gpu", "fence.sc.gpu", "fence.acq_rel.sys", "fence.sc.sys"]
        .contains(&opcode(line))
}

fn is_barrier(line: &str) -> bool {
    ["bar.sync", "barrier.sync"].iter().any(|barrier| opcode(line).starts_with(barrier))
}

fn is_global_atomic(line: &str) -> bool {
    let opcode = opcode(line);
    (opcode.starts_with("atom.") || opcode.starts_with("red.")) && !opcode.contains(".shared")
}

/// Whether it touches memory that another block may see: anything but parameters and shared memory.
fn is_device_access(line: &str) -> bool {
    let opcode = opcode(line);
    (opcode.starts_with("ld.") || opcode.starts_with("st."))
        && !opcode.contains(".param")
        && !opcode.contains(".shared")
}

fn is_device_load(line: &str) -> bool {
    is_device_access(line) && opcode(line).starts_with("ld.")
}

/// Where control may go from line `at`.
fn successors(entry: &Entry, at: usize) -> Vec<usize> {
    let line = entry.lines[at];
    let mut next = Vec::new();
    if opcode(line).starts_with("bra") {
        let label = format!("{}:", operands(line).next().unwrap());
        next.push(entry.lines.iter().position(|line| *line == label).expect("a label of the kernel"));
    }
    let ends = ["bra", "ret", "exit", "trap"].iter().any(|end| opcode(line).split('.').next() == Some(end));
    if !ends || line.starts_with('@') {
        next.push(at + 1);
    }
    next
}

/// Which registers hold addresses that were computed from the parameter at `offset`, and which from shared memory.
fn addresses<'a>(entry: &Entry<'a>, offset: usize) -> [BTreeSet<&'a str>; 2] {
    // Registers that hold the address of the parameters, and how far from their beginning.
    let mut parameters = BTreeMap::from([(String::new(), 0i64)]);
    parameters.insert(format!("{}_param_0", entry.name), 0);
    let mut found = [BTreeSet::new(), BTreeSet::new()];
    loop {
        let before = (parameters.len(), found[0].len(), found[1].len());
        for line in &entry.lines {
            let words: Vec<&str> = operands(line).collect();
            let Some((target, sources)) = words.split_first() else { continue };
            let operation = opcode(line);
            if operation.starts_with("ld.param") {
                // `{a, b}, [base+offset]`: a vector's elements lie one behind the other.
                let count = if line.contains('{') {
                    line[line.find('{').unwrap()..line.find('}').unwrap()].split(',').count()
                } else {
                    1
                };
                let base = words.get(count).and_then(|base| parameters.get(*base));
                let far: i64 = words.get(count + 1).map_or(0, |far| far.parse().unwrap());
                for (i, register) in words[..count].iter().enumerate() {
                    if base.is_some_and(|base| base + far + 8 * i as i64 == offset as i64) && operation.ends_with("64")
                    {
                        found[0].insert(*register);
                    }
                }
            } else if operation.starts_with("cvta.shared") {
                found[1].insert(*target);
            } else if ["mov", "add", "sub", "cvta", "selp", "mad"].contains(&operation.split('.').next().unwrap()) {
                for found in &mut found {
                    if sources.iter().any(|source| found.contains(source)) {
                        found.insert(*target);
                    }
                }
                let base = sources.first().and_then(|base| parameters.get(*base)).copied();
                let far = sources.get(1).map_or(Ok(0), |far| far.parse::<i64>());
                if let (Some(base), Ok(far)) = (base, far) {
                    parameters.insert(target.to_string(), base + far);
                }
            }
        }
        if before == (parameters.len(), found[0].len(), found[1].len()) {
            return found;
        }
    }
}

/// A line that `must_wait` and can be reached from line `from` with no line that `stops` on the way.
fn not_before(
    entry: &Entry,
    from: usize,
    stops: impl Fn(&str) -> bool,
    must_wait: impl Fn(&str) -> bool,
) -> Option<usize> {
    let (mut left, mut seen) = (vec![from], BTreeSet::new());
    while let Some(at) = left.pop() {
        if at >= entry.lines.len() || !seen.insert(at) || stops(entry.lines[at]) {
            continue;
        }
        if must_wait(entry.lines[at]) {
            return Some(at);
        }
        left.extend(successors(entry, at));
    }
    None
}

/// What is wrong with how the blocks of a kernel hand results to each other, through the workspace whose address is the
/// parameter at `workspace`; `atomics` is how many counters there are.
fn handing_over(entry: &Entry, workspace: usize, atomics: usize) -> Result<(), String> {
    let lines = &entry.lines;
    let wrong = |at: usize, what: &str| Err(format!("{}: {what}: {}", entry.name, lines[at]));
    let counts: Vec<usize> = (0..lines.len()).filter(|at| is_global_atomic(lines[*at])).collect();
    if counts.len() != atomics {
        return Err(format!("{}: {} global atomics, expected {atomics}", entry.name, counts.len()));
    }
    for count in counts {
        // Straight up from the count: the fence, then the barrier, and nothing in between that they are for.
        let (mut at, mut fence) = (count, None);
        let barrier = loop {
            at -= 1;
            let line = lines[at];
            if line.ends_with(':') || opcode(line) == "bra" && !line.starts_with('@') || at == 0 {
                return wrong(count, "no fence behind a barrier straight before the count");
            }
            if is_device_access(line) {
                return wrong(at, "an access between barrier, fence and count");
            }
            if is_fence(line) && !line.starts_with('@') {
                fence = Some(at);
            }
            if is_barrier(line) {
                if fence.is_none() || line.starts_with('@') {
                    return wrong(at, "a barrier without a fence between it and the count");
                }
                break at;
            }
        };
        // The thread that counted fences again before it meets the others, and none reads anything before that. Others
        // come from the barrier before straight to the one behind.
        let waits_or_reads = |line: &str| is_barrier(line) || is_device_load(line) || is_global_atomic(line);
        if let Some(at) = not_before(entry, count + 1, is_fence, waits_or_reads) {
            return wrong(at, "reached from the count without a fence");
        }
        if let Some(at) = not_before(entry, barrier + 1, is_barrier, is_device_load) {
            return wrong(at, "read after the count without a barrier");
        }
    }
    // Pointers that may also be to shared memory are a block's own keys.
    let [of_workspace, of_shared] = addresses(entry, workspace);
    let mut reads = 0;
    for (at, line) in lines.iter().enumerate().filter(|(_, line)| is_device_load(line)) {
        let address = line[line.rfind('[').unwrap() + 1..].split(['+', ']']).next().unwrap();
        if of_workspace.contains(address) && !of_shared.contains(address) {
            reads += 1;
            if ![".cg", ".volatile", ".relaxed.gpu", ".acquire.gpu"].iter().any(|way| opcode(line).contains(way)) {
                return wrong(at, "what other blocks wrote is read through the L1 cache");
            }
        }
    }
    if reads == 0 { Err(format!("{}: nothing is read from the workspace", entry.name)) } else { Ok(()) }
}

fn is_told_to_host(line: &str) -> bool {
    opcode(line).starts_with("st.relaxed.sys.global")
}

/// What is wrong with how a kernel tells the host, in `words` words.
fn telling_the_host(entry: &Entry, words: usize) -> Result<(), String> {
    let lines = &entry.lines;
    let wrong = |at: usize, what: &str| Err(format!("{}: {what}: {}", entry.name, lines[at]));
    let told: Vec<usize> = (0..lines.len()).filter(|at| is_told_to_host(lines[*at])).collect();
    let Some(last) = told.last().copied().filter(|_| told.len() == words) else {
        return Err(format!("{}: {} words to the host, expected {words}", entry.name, told.len()));
    };
    // Straight up from the last word: the fence, and no access in between.
    let straight = lines[..last].iter().rposition(|line| is_device_access(line) || line.ends_with(':'));
    let fences = ["membar.sys", "fence.sc.sys", "fence.acq_rel.sys"];
    if !lines[straight.unwrap_or(0)..last].iter().any(|line| fences.contains(line)) {
        return wrong(last, "no fence for the whole system straight before the last word");
    }
    // It is the last, and what any thread stores before is behind a barrier: but what the thread that tells stores itself,
    // which is all that follows the last barrier.
    let stores = |line: &str| is_device_access(line) && !is_device_load(line);
    if let Some(at) = not_before(entry, last + 1, |_| false, stores) {
        return wrong(at, "stored after the last word");
    }
    let barrier = lines[..last].iter().rposition(|line| is_barrier(line)).unwrap_or(0);
    for store in (0..barrier).filter(|at| stores(lines[*at])) {
        if not_before(entry, store + 1, is_barrier, is_told_to_host).is_some() {
            return wrong(store, "told to the host without a barrier");
        }
    }
    if not_before(entry, 0, is_barrier, is_told_to_host).is_some() || barrier == 0 {
        return wrong(last, "reached without a barrier");
    }
    Ok(())
}

/// Where a kernel's workspace stands in its parameters and how many counters it has; none if blocks do not meet.
fn counters(kernel: &str) -> Option<(usize, usize)> {
    match kernel {
        name if name.starts_with("unmask") => Some((offset_of!(dllm_unmask_params, workspace), 2)),
        name if name.starts_with("vverify") => Some((offset_of!(dllm_vverify_params, workspace), 1)),
        _ => None,
    }
}

/// How many words a kernel tells the host.
fn words_to_host(kernel: &str) -> usize {
    if kernel == "advance" { offset_of!(dllm_progress, reserved) / 4 } else { 0 }
}

/// All that is asked of a module's text.
fn check(module: &str, target: &str, ptx: &str) -> Result<(), String> {
    let must = |holds: bool, what: String| if holds { Ok(()) } else { Err(format!("{module}: {what}")) };
    let isa = manifest("isa ");
    must(ptx.starts_with(&format!(".version {isa}\n")), format!("not of version {isa}"))?;
    let target = target.replace("compute_", "sm_");
    must(ptx.contains(&format!("\n.target {target}\n")), format!("not for {target}"))?;
    must(!ptx.contains(".local"), "local memory is used".into())?;
    // How many rows a ratio or a probability makes is computed in f64, and nothing else.
    must(["cut", "vverify"].contains(&module) || !ptx.contains(".f64"), "arithmetic in f64".into())?;
    let entries = entries(ptx);
    must(!entries.is_empty(), "no kernel".into())?;
    for entry in entries {
        must(entry.lines.len() > 10, format!("{}: no instructions", entry.name))?;
        match counters(entry.name) {
            Some((workspace, atomics)) => handing_over(&entry, workspace, atomics)?,
            None => {
                let atomic = entry.lines.iter().find(|line| is_global_atomic(line));
                must(atomic.is_none(), format!("{}: blocks meet, and `counters` does not know it", entry.name))?;
            }
        }
        match words_to_host(entry.name) {
            0 => {
                let told = entry.lines.iter().find(|line| is_told_to_host(line));
                must(told.is_none(), format!("{}: tells the host, and `words_to_host` does not know it", entry.name))?;
            }
            words => telling_the_host(&entry, words)?,
        }
    }
    Ok(())
}

/// What stands behind `key` in the manifest of ptx/.
fn manifest(key: &str) -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/ptx/SOURCE_HASH");
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("{path}: no {key}")).to_string()
}

fn module(name: &str) -> &'static Module {
    Module::all().iter().find(|module| module.name == name).unwrap()
}

#[test]
fn every_module_is_as_it_should_be() {
    for module in Module::all() {
        check(module.name, module.target, module.ptx).unwrap();
        let ending = if module.target == "compute_90a" { ".sm90a.ptx" } else { ".ptx" };
        assert_eq!(manifest(&format!("{}{ending} ", module.name)), module.target);
    }
}

/// Every fence and barrier around a count and every read past L1 is missed when it is gone; and what must not be there is
/// seen.
#[test]
fn texts_with_a_fault_are_refused() {
    for name in ["unmask", "vverify"] {
        let good = module(name);
        let refused = |ptx: &str, says: &str| {
            let error = check(name, good.target, ptx).expect_err(says);
            assert!(error.contains(says), "{error}");
        };
        let lines: Vec<&str> = good.ptx.split_inclusive('\n').collect();
        // The text with another line in place of one.
        let with = |at: usize, line: &str| [&lines[..at].concat(), line, &lines[at + 1..].concat()].concat();
        let nearest = |at: usize, step: isize, what: &str| {
            let mut at = at;
            while !lines[at].contains(what) {
                at = at.checked_add_signed(step).unwrap();
            }
            at
        };
        let counts: Vec<usize> = (0..lines.len()).filter(|at| lines[*at].contains("atom.global")).collect();
        assert_eq!(counts.len(), entries(good.ptx).iter().map(|entry| counters(entry.name).unwrap().1).sum::<usize>());
        for count in counts {
            let [fence, barrier] = ["membar.gl", "bar.sync"].map(|what| nearest(count, -1, what));
            let [fence_after, barrier_after] = ["membar.gl", "bar.sync"].map(|what| nearest(count, 1, what));
            for weaker in ["", "\tmembar.cta;\n", "\t@%p1 membar.gl;\n"] {
                refused(&with(fence, weaker), "without a fence between it and the count");
            }
            for weaker in ["", "\tmembar.cta;\n"] {
                refused(&with(fence_after, weaker), "without a fence");
            }
            refused(&with(barrier, ""), "straight before the count");
            refused(&with(barrier_after, ""), "without a barrier");
            // The right lines in the wrong order: a fence of each thread's own before the barrier, or behind the one after.
            let swapped = |a: usize, b: usize| {
                let mut lines = lines.clone();
                lines.swap(a, b);
                lines.concat()
            };
            refused(&swapped(barrier, fence), "without a fence between it and the count");
            refused(&swapped(fence, count), "between it and the count");
            refused(&swapped(fence_after, barrier_after), "reached from the count without a fence");
            refused(&with(count, &format!("\tst.global.u32 [%rd1], %r1;\n{}", lines[count])), "an access between");
        }
        let reads: Vec<usize> = (0..lines.len()).filter(|at| lines[*at].contains("ld.global.cg")).collect();
        assert!(!reads.is_empty());
        for read in reads {
            refused(&with(read, &lines[read].replace(".cg", "")), "through the L1 cache");
        }

        refused(&good.ptx.replacen(".version 8.0", ".version 9.0", 1), "version");
        refused(&good.ptx.replacen(".target sm_80", ".target sm_90", 1), "not for");
        refused(&good.ptx.replacen("\tret;", "\t.local .align 4 .b8 __local_depot0[8];\n\tret;", 1), "local memory");
        refused(&good.ptx.replacen("atom.global.add", "atom.shared.add", 1), "global atomics");
    }
    let rows = module("rows");
    let wrong = rows.ptx.replacen("\tret;", "\tadd.f64 %fd1, %fd1, %fd1;\n\tret;", 1);
    assert!(check("rows", rows.target, &wrong).unwrap_err().contains("f64"));
    let wrong = rows.ptx.replacen("\tret;", "\tred.global.add.u32 [%rd1], 1;\n\tret;", 1);
    assert!(check("rows", rows.target, &wrong).unwrap_err().contains("blocks meet"));
}

/// The same of the fence and the barriers before the host is told.
#[test]
fn telling_the_host_too_early_is_refused() {
    let good = module("advance");
    let lines: Vec<&str> = good.ptx.split_inclusive('\n').collect();
    let refused = |ptx: &str, says: &str| {
        let error = check("advance", good.target, ptx).expect_err(says);
        assert!(error.contains(says), "{error}");
    };
    let with = |at: usize, line: &str| [&lines[..at].concat(), line, &lines[at + 1..].concat()].concat();
    let places = |what: &str| (0..lines.len()).filter(|at| lines[*at].contains(what)).collect::<Vec<_>>();
    let told = places("st.relaxed.sys.global");
    let last = *told.last().unwrap();
    let &[fence] = &places("membar.sys")[..] else { panic!("not one fence") };
    for weaker in ["", "\tmembar.gl;\n", "\t@%p1 membar.sys;\n"] {
        refused(&with(fence, weaker), "no fence for the whole system");
    }
    let mut swapped = lines.clone();
    swapped.swap(fence, *told.first().unwrap());
    refused(&swapped.concat(), "no fence for the whole system");
    let mut swapped = lines.clone();
    swapped.swap(fence, last);
    refused(&swapped.concat(), "no fence for the whole system");
    refused(&with(last, &format!("{}\tst.global.u32 [%rd1], %r1;\n", lines[last])), "stored after the last word");
    refused(&with(last, "\tst.global.u32 [%rd1], %r1;\n"), "5 words to the host, expected 6");
    let without: String = lines.iter().filter(|line| !line.contains("bar.sync")).copied().collect();
    refused(&without, "without a barrier");
    let rows = module("rows");
    let wrong = rows.ptx.replacen("\tret;", "\tst.relaxed.sys.global.s32 [%rd1], %r1;\n\tret;", 1);
    assert!(check("rows", rows.target, &wrong).unwrap_err().contains("tells the host"));
}

/// The kernels of the PTX are those that the software device runs; it has a few more, for its own tests.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no software device for this target"
)]
fn every_kernel_has_a_host_twin() {
    let in_ptx: BTreeSet<String> =
        Module::all().iter().flat_map(|module| entries(module.ptx)).map(|entry| entry.name.to_string()).collect();
    softgpu::install();
    let on_host: BTreeSet<String> = softgpu::kernel_names().into_iter().collect();
    let own: BTreeSet<String> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/softgpu/tests/kernels"))
        .unwrap()
        .flat_map(|file| {
            let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
            let names = text.split("SOFTGPU_KERNEL(").skip(1).map(|rest| rest.split(')').next().unwrap().to_string());
            names.collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(in_ptx.intersection(&own).next(), None, "a test's kernel has the name of one that ships");
    assert_eq!(on_host, in_ptx.union(&own).cloned().collect());
}
