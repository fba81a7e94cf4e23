//! Kernels of this build, driver and devices. Launches nothing.

use dllm_kernels::Result;
use dllm_kernels::gpu::{Device, DeviceInfo, Module};
use serde::Serialize;

/// Requirements of the kernels.
pub const NEEDED: &str = "needed: an NVIDIA driver of 525 or later, and a device of compute capability 8.0 or later";
/// CUDA version of driver 525.
const MIN_CUDA: (i32, i32) = (12, 0);

/// Kernels of this build.
#[derive(Serialize)]
pub struct Build {
    version: &'static str,
    /// PTX version that the driver must support.
    ptx_isa: &'static str,
    source_hash: &'static str,
    /// Set when the modules have line information for profilers.
    source_lines: bool,
    modules: Vec<BuiltModule>,
}

#[derive(Serialize)]
struct BuiltModule {
    name: &'static str,
    target: &'static str,
    kernels: usize,
}

impl Build {
    pub fn this() -> Build {
        let built = |m: &Module| BuiltModule { name: m.name, target: m.target, kernels: m.kernels().count() };
        Build {
            version: env!("CARGO_PKG_VERSION"),
            ptx_isa: Module::isa(),
            source_hash: Module::source_hash(),
            source_lines: Module::all().iter().any(Module::has_lines),
            modules: Module::all().iter().map(built).collect(),
        }
    }

    pub fn text(&self) -> String {
        let lines = if self.source_lines { ", with source lines" } else { "" };
        let modules = |target: &&str| {
            let matching = self.modules.iter().filter(|m| m.target == *target);
            let names: Vec<_> = matching.map(|m| format!("{} ({})", m.name, m.kernels)).collect();
            format!("  {target}  {}\n", names.join(", "))
        };
        let mut targets: Vec<_> = self.modules.iter().map(|m| m.target).collect();
        targets.sort_unstable();
        targets.dedup();
        format!(
            "build    dllm {}, PTX {}, sources {}{lines}; modules (number of kernels):\n{}",
            self.version,
            self.ptx_isa,
            self.source_hash,
            targets.iter().map(modules).collect::<String>()
        )
    }
}

/// Driver and devices.
#[derive(Serialize)]
pub struct Machine {
    /// CUDA version that the driver supports.
    cuda: String,
    /// Version of the driver, if the system reports it.
    driver: Option<String>,
    /// Set when the driver supports the kernels.
    new_enough: bool,
    devices: Vec<Listed>,
}

#[derive(Serialize)]
struct Listed {
    ordinal: usize,
    name: String,
    capability: String,
    memory_bytes: usize,
    multiprocessors: usize,
    /// Set when the device supports the kernels.
    usable: bool,
    software: bool,
}

impl Machine {
    /// Queries driver and devices.
    ///
    /// # Errors
    /// As [`Device::count`].
    pub fn this() -> Result<Machine> {
        let listed = |info: DeviceInfo| Listed {
            software: info.is_software(),
            ordinal: info.ordinal,
            capability: format!("{}.{}", info.capability.0, info.capability.1),
            memory_bytes: info.memory_bytes,
            multiprocessors: info.multiprocessors,
            usable: info.capability >= (8, 0),
            name: info.name,
        };
        let devices: Vec<Listed> = DeviceInfo::all()?.into_iter().map(listed).collect();
        let cuda = Device::driver_version()?;
        // The CUDA emulator has its own driver.
        let is_real = devices.iter().all(|device| !device.software);
        let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok().filter(|_| is_real);
        Ok(Machine {
            cuda: format!("{}.{}", cuda.0, cuda.1),
            driver: driver.and_then(|text| driver_version(&text)),
            new_enough: cuda >= MIN_CUDA,
            devices,
        })
    }

    /// Returns the number of devices.
    pub fn count(&self) -> usize {
        self.devices.len()
    }

    pub fn is_software(&self, device: usize) -> bool {
        self.devices.get(device).is_some_and(|listed| listed.software)
    }

    pub fn text(&self) -> String {
        let own = self.driver.as_ref().map(|version| format!(", version {version}")).unwrap_or_default();
        let old = if self.new_enough { String::new() } else { format!(": too old; {NEEDED}") };
        let mut text = format!("driver   CUDA {}{own}{old}\n", self.cuda);
        if self.devices.is_empty() {
            text += "devices  none\n";
        }
        for (i, device) in self.devices.iter().enumerate() {
            let head = if i == 0 { "devices" } else { "" };
            text += &format!(
                "{head:<7}  {}: {}, compute capability {}, {}, {} multiprocessors{}\n",
                device.ordinal,
                device.name,
                device.capability,
                crate::report::bytes(device.memory_bytes),
                device.multiprocessors,
                if device.usable { "" } else { ": too old for the kernels, which need 8.0" },
            );
        }
        text
    }
}

/// Returns the first version number in `/proc/driver/nvidia/version`.
fn driver_version(text: &str) -> Option<String> {
    let is_version = |word: &&str| {
        let mut parts = word.split('.');
        word.contains('.') && parts.all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
    };
    text.lines().next()?.split_whitespace().find(is_version).map(str::to_owned)
}

/// Module that a device loads.
#[derive(Serialize)]
pub struct Loads {
    name: &'static str,
    target: Option<&'static str>,
    why: String,
}

/// Returns, for each kernel file, the module that a device of this capability loads, and the reason.
pub fn modules(capability: (i32, i32)) -> Vec<Loads> {
    let mut names: Vec<_> = Module::all().iter().map(|module| module.name).collect();
    names.dedup();
    let loads = |name| {
        let chosen = Module::choose(name, capability).map(|module| module.target);
        let others: Vec<_> =
            Module::all().iter().filter(|m| m.name == name && Some(m.target) != chosen).map(|m| m.target).collect();
        let (major, minor) = capability;
        let why = match (chosen, others.as_slice()) {
            (None, _) => format!("none is for {major}.{minor}"),
            (Some(_), []) => "the only one".into(),
            (Some("compute_90a"), _) => "made for 9.0".into(),
            (Some(_), others) => format!("{} is for 9.0 alone", others.join(", ")),
        };
        Loads { name, target: chosen, why }
    };
    names.into_iter().map(loads).collect()
}

/// Formats the modules, one line per target and reason.
pub fn modules_text(loads: &[Loads]) -> String {
    let mut text = String::new();
    let mut kinds: Vec<_> = loads.iter().map(|load| (load.target, &load.why)).collect();
    kinds.sort_unstable();
    kinds.dedup();
    for (i, (target, why)) in kinds.into_iter().enumerate() {
        let matching = loads.iter().filter(|load| load.target == target && load.why == *why);
        let names: Vec<_> = matching.map(|load| load.name).collect();
        let head = if i == 0 { "loads" } else { "" };
        text += &format!("{head:<7}  {} ({why}): {}\n", target.unwrap_or("nothing"), names.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_version_is_found() {
        let version = |text: &str| driver_version(text).unwrap_or_default();
        let closed =
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version:";
        assert_eq!(version(closed), "535.129.03");
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (x)";
        assert_eq!(version(open), "580.95.05");
        assert_eq!(version("something else\n1.2"), "");
    }

    #[test]
    fn modules_say_why() {
        let why = |capability, name| {
            let all = modules(capability);
            all.into_iter().find(|load| load.name == name).map(|load| (load.target, load.why))
        };
        assert_eq!(why((9, 0), "gather_scatter"), Some((Some("compute_80"), "the only one".into())));
        assert_eq!(why((7, 5), "gather_scatter"), Some((None, "none is for 7.5".into())));
        let text = modules_text(&modules((9, 0)));
        assert!(text.starts_with("loads    compute_80 (the only one): "), "{text}");
        assert!(text.contains("unmask"), "{text}");
    }
}
