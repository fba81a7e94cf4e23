//! Memory-ordering checks on the shipped PTX, which no run on the CUDA emulator can make: communication between blocks and
//! with the host. Also checks that every module contains what it must and nothing that it must not.
//!
//! A kernel whose blocks count themselves with a global atomic must
//! - before the count: wait for all threads of the block and then fence for the whole device, in the thread that counts. In
//!   that order the fence covers the stores of all threads;
//! - after the count: fence again in that thread, and wait once more before anything is read;
//! - read results of other blocks with loads that bypass the L1 cache, which is not coherent.
//!
//! A kernel that reports to the host must store its report after a barrier of its block, then fence for the whole system, and
//! only then store the progress counter that the host polls, as its last store.

use dllm_kernels::abi::{dllm_progress, dllm_unmask_params, dllm_vverify_params};
use dllm_kernels::gpu::Module;
use std::collections::{BTreeMap, BTreeSet};
use std::mem::offset_of;

/// A kernel's name and instructions. Labels keep their colon; semicolons are removed.
struct Entry<'a> {
    name: &'a str,
    lines: Vec<&'a str>,
}

/// Returns the kernels of a module.
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

/// Returns the instruction of a line without its predicate.
fn instruction(line: &str) -> &str {
    match line.strip_prefix('@') {
        Some(line) => line.split_once(' ').map_or("", |(_, rest)| rest),
        None => line,
    }
}

fn opcode(line: &str) -> &str {
    instruction(line).split_whitespace().next().unwrap_or("")
}

/// Returns the operands of a line: registers, names and numbers.
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

/// Whether the line accesses memory that other blocks can see: not parameters, not shared memory.
fn is_device_access(line: &str) -> bool {
    let opcode = opcode(line);
    (opcode.starts_with("ld.") || opcode.starts_with("st."))
        && !opcode.contains(".param")
        && !opcode.contains(".shared")
}

fn is_device_load(line: &str) -> bool {
    is_device_access(line) && opcode(line).starts_with("ld.")
}

/// Returns the lines that may follow line `at`.
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

/// Returns the registers with addresses computed from the parameter at `offset`, and those with shared-memory addresses.
fn addresses<'a>(entry: &Entry<'a>, offset: usize) -> [BTreeSet<&'a str>; 2] {
    // Registers that hold an address in the parameters, and its offset.
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
                // `{a, b}, [base+offset]`: the elements of a vector are contiguous.
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

/// Returns a line for which `must_wait` holds and that control reaches from line `from` without a line that `stops`.
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

/// Checks the communication between the blocks of a kernel, through the workspace whose address is the parameter at offset
/// `workspace`. `atomics`: number of counters.
fn check_block_communication(entry: &Entry, workspace: usize, atomics: usize) -> Result<(), String> {
    let lines = &entry.lines;
    let wrong = |at: usize, what: &str| Err(format!("{}: {what}: {}", entry.name, lines[at]));
    let counts: Vec<usize> = (0..lines.len()).filter(|at| is_global_atomic(lines[*at])).collect();
    if counts.len() != atomics {
        return Err(format!("{}: {} global atomics, expected {atomics}", entry.name, counts.len()));
    }
    for count in counts {
        // Directly before the count, upwards: the fence, then the barrier, with no device access between them.
        let (mut at, mut fence) = (count, None);
        let barrier = loop {
            at -= 1;
            let line = lines[at];
            if line.ends_with(':') || opcode(line) == "bra" && !line.starts_with('@') || at == 0 {
                return wrong(count, "no barrier and fence directly before the count");
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
        // The thread that counted fences again before it joins the others, and no thread reads anything before that. The
        // other threads go directly from the first barrier to the second.
        let waits_or_reads = |line: &str| is_barrier(line) || is_device_load(line) || is_global_atomic(line);
        if let Some(at) = not_before(entry, count + 1, is_fence, waits_or_reads) {
            return wrong(at, "reached from the count without a fence");
        }
        if let Some(at) = not_before(entry, barrier + 1, is_barrier, is_device_load) {
            return wrong(at, "read after the count without a barrier");
        }
    }
    // Pointers that may also point to shared memory hold a block's own keys.
    let [of_workspace, of_shared] = addresses(entry, workspace);
    let mut reads = 0;
    for (at, line) in lines.iter().enumerate().filter(|(_, line)| is_device_load(line)) {
        let address = line[line.rfind('[').unwrap() + 1..].split(['+', ']']).next().unwrap();
        if of_workspace.contains(address) && !of_shared.contains(address) {
            reads += 1;
            if ![".cg", ".volatile", ".relaxed.gpu", ".acquire.gpu"].iter().any(|way| opcode(line).contains(way)) {
                return wrong(at, "results of other blocks are read through the L1 cache");
            }
        }
    }
    if reads == 0 { Err(format!("{}: nothing is read from the workspace", entry.name)) } else { Ok(()) }
}

fn is_host_report(line: &str) -> bool {
    opcode(line).starts_with("st.relaxed.sys.global")
}

/// Checks a kernel's report to the host, which has `words` 32-bit words.
fn check_host_report(entry: &Entry, words: usize) -> Result<(), String> {
    let lines = &entry.lines;
    let wrong = |at: usize, what: &str| Err(format!("{}: {what}: {}", entry.name, lines[at]));
    let reports: Vec<usize> = (0..lines.len()).filter(|at| is_host_report(lines[*at])).collect();
    let Some(last) = reports.last().copied().filter(|_| reports.len() == words) else {
        return Err(format!("{}: expected {words} words to the host, found {}", entry.name, reports.len()));
    };
    // Directly before the last word: the fence, with no device access between them.
    let straight = lines[..last].iter().rposition(|line| is_device_access(line) || line.ends_with(':'));
    let fences = ["membar.sys", "fence.sc.sys", "fence.acq_rel.sys"];
    if !lines[straight.unwrap_or(0)..last].iter().any(|line| fences.contains(line)) {
        return wrong(last, "no fence for the whole system directly before the last word");
    }
    // The last word is the last store. Every store of another thread is before a barrier; after the last barrier, only the
    // reporting thread stores.
    let stores = |line: &str| is_device_access(line) && !is_device_load(line);
    if let Some(at) = not_before(entry, last + 1, |_| false, stores) {
        return wrong(at, "stored after the last word");
    }
    let barrier = lines[..last].iter().rposition(|line| is_barrier(line)).unwrap_or(0);
    for store in (0..barrier).filter(|at| stores(lines[*at])) {
        if not_before(entry, store + 1, is_barrier, is_host_report).is_some() {
            return wrong(store, "reported to the host without a barrier");
        }
    }
    if not_before(entry, 0, is_barrier, is_host_report).is_some() || barrier == 0 {
        return wrong(last, "reached without a barrier");
    }
    Ok(())
}

/// Returns the offset of the workspace in a kernel's parameters and its number of counters; `None` without communication.
fn counters(kernel: &str) -> Option<(usize, usize)> {
    match kernel {
        name if name.starts_with("unmask") => Some((offset_of!(dllm_unmask_params, workspace), 2)),
        name if name.starts_with("vverify") => Some((offset_of!(dllm_vverify_params, workspace), 1)),
        _ => None,
    }
}

/// Returns the number of words that a kernel reports to the host.
fn words_to_host(kernel: &str) -> usize {
    if kernel == "advance" { offset_of!(dllm_progress, reserved) / 4 } else { 0 }
}

/// Checks the text of a module.
fn check(module: &str, target: &str, ptx: &str) -> Result<(), String> {
    let must = |holds: bool, what: String| if holds { Ok(()) } else { Err(format!("{module}: {what}")) };
    let isa = manifest("isa ");
    must(ptx.starts_with(&format!(".version {isa}\n")), format!("not of version {isa}"))?;
    let target = target.replace("compute_", "sm_");
    must(ptx.contains(&format!("\n.target {target}\n")), format!("not for {target}"))?;
    must(!ptx.contains(".local"), "local memory is used".into())?;
    // Only the product of a ratio or probability and a count is computed in f64.
    must(["top_k_top_p", "vverify"].contains(&module) || !ptx.contains(".f64"), "arithmetic in f64".into())?;
    let entries = entries(ptx);
    must(!entries.is_empty(), "no kernel".into())?;
    for entry in entries {
        must(entry.lines.len() > 10, format!("{}: no instructions", entry.name))?;
        match counters(entry.name) {
            Some((workspace, atomics)) => check_block_communication(&entry, workspace, atomics)?,
            None => {
                let atomic = entry.lines.iter().find(|line| is_global_atomic(line));
                must(atomic.is_none(), format!("{}: blocks communicate, but `counters` does not list it", entry.name))?;
            }
        }
        match words_to_host(entry.name) {
            0 => {
                let reports = entry.lines.iter().find(|line| is_host_report(line));
                must(
                    reports.is_none(),
                    format!("{}: reports to the host, but `words_to_host` does not list it", entry.name),
                )?;
            }
            words => check_host_report(&entry, words)?,
        }
    }
    Ok(())
}

/// Returns the value of `key` in the manifest of ptx/.
fn manifest(key: &str) -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/ptx/SOURCE_HASH");
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("{path}: no {key}")).to_string()
}

fn module(name: &str) -> &'static Module {
    Module::all().iter().find(|module| module.name == name).unwrap()
}

#[test]
fn every_module_passes() {
    for module in Module::all() {
        check(module.name, module.target, module.ptx).unwrap();
        let ending = if module.target == "compute_90a" { ".sm90a.ptx" } else { ".ptx" };
        assert_eq!(manifest(&format!("{}{ending} ", module.name)), module.target);
    }
}

/// Removing or weakening a fence, a barrier or a load that bypasses L1 is detected, and so is forbidden content.
#[test]
fn wrong_modules_are_refused() {
    for name in ["unmask", "vverify"] {
        let good = module(name);
        let refused = |ptx: &str, says: &str| {
            let error = check(name, good.target, ptx).expect_err(says);
            assert!(error.contains(says), "{error}");
        };
        let lines: Vec<&str> = good.ptx.split_inclusive('\n').collect();
        // The text with line `at` replaced.
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
            refused(&with(barrier, ""), "directly before the count");
            refused(&with(barrier_after, ""), "without a barrier");
            // The right lines in the wrong order: each thread's fence before the barrier, or after the second barrier.
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
    let rows = module("gather_scatter");
    let wrong = rows.ptx.replacen("\tret;", "\tadd.f64 %fd1, %fd1, %fd1;\n\tret;", 1);
    assert!(check("gather_scatter", rows.target, &wrong).unwrap_err().contains("f64"));
    let wrong = rows.ptx.replacen("\tret;", "\tred.global.add.u32 [%rd1], 1;\n\tret;", 1);
    assert!(check("gather_scatter", rows.target, &wrong).unwrap_err().contains("blocks communicate"));
}

/// Removing or moving the fence or the barriers before the report to the host is detected.
#[test]
fn reports_to_the_host_without_fence_or_barrier_are_refused() {
    let good = module("advance");
    let lines: Vec<&str> = good.ptx.split_inclusive('\n').collect();
    let refused = |ptx: &str, says: &str| {
        let error = check("advance", good.target, ptx).expect_err(says);
        assert!(error.contains(says), "{error}");
    };
    let with = |at: usize, line: &str| [&lines[..at].concat(), line, &lines[at + 1..].concat()].concat();
    let places = |what: &str| (0..lines.len()).filter(|at| lines[*at].contains(what)).collect::<Vec<_>>();
    let reports = places("st.relaxed.sys.global");
    let last = *reports.last().unwrap();
    let &[fence] = &places("membar.sys")[..] else { panic!("not one fence") };
    for weaker in ["", "\tmembar.gl;\n", "\t@%p1 membar.sys;\n"] {
        refused(&with(fence, weaker), "no fence for the whole system");
    }
    let mut swapped = lines.clone();
    swapped.swap(fence, *reports.first().unwrap());
    refused(&swapped.concat(), "no fence for the whole system");
    let mut swapped = lines.clone();
    swapped.swap(fence, last);
    refused(&swapped.concat(), "no fence for the whole system");
    refused(&with(last, &format!("{}\tst.global.u32 [%rd1], %r1;\n", lines[last])), "stored after the last word");
    refused(&with(last, "\tst.global.u32 [%rd1], %r1;\n"), "expected 6 words to the host, found 5");
    let without: String = lines.iter().filter(|line| !line.contains("bar.sync")).copied().collect();
    refused(&without, "without a barrier");
    let rows = module("gather_scatter");
    let wrong = rows.ptx.replacen("\tret;", "\tst.relaxed.sys.global.s32 [%rd1], %r1;\n\tret;", 1);
    assert!(check("gather_scatter", rows.target, &wrong).unwrap_err().contains("reports to the host"));
}

/// The CUDA emulator has every kernel of the PTX, and a few more for its own tests.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "the CUDA emulator does not support this target"
)]
fn every_kernel_is_built_for_the_emulator() {
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
