//! What the system tells about this machine.

use crate::results::{CpuCache, MachineFacts};
use bitnet_kernels::Kernels;
use std::time::{SystemTime, UNIX_EPOCH};

/// Processor, caches, memory and instruction sets of this machine.
pub fn facts() -> MachineFacts {
    let cpuinfo = text("/proc/cpuinfo");
    let cpu = field(&cpuinfo, "model name")
        .or_else(|| field(&cpuinfo, "Hardware"))
        .unwrap_or("unknown");
    let model = field(&cpuinfo, "model").map_or(String::new(), |model| format!(", model {model}"));
    MachineFacts {
        cpu: format!("{cpu}{model}"),
        processors: processors(),
        caches: caches(),
        available_bytes: available(),
        system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        isas: Kernels::all().map(|k| k.isa().to_string()).collect(),
    }
}

/// Logical processors that this process may use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Default size of a working set in bytes that caches do not hold: four times the last cache (so
/// at most a quarter of it remains cached), 256 MiB at least, and at most a twelfth of the
/// available memory, because every contender has its own copy.
pub fn working_set() -> usize {
    let last = caches().iter().map(|c| c.bytes).max().unwrap_or(64 << 20);
    let most = available().map_or(1 << 30, |bytes| bytes / 12);
    (4 * last).max(256 << 20).min(most.max(16 << 20)) as usize
}

/// Size of one L2 cache in bytes.
pub(crate) fn l2_bytes() -> usize {
    caches()
        .iter()
        .find(|c| c.level == 2)
        .map_or(512 << 10, |c| c.bytes as usize)
}

fn caches() -> Vec<CpuCache> {
    let read = |index: usize| {
        let file = |name: &str| {
            text(&format!(
                "/sys/devices/system/cpu/cpu0/cache/index{index}/{name}"
            ))
        };
        let size = file("size");
        let (number, factor) = match size.trim().strip_suffix('K') {
            Some(kib) => (kib, 1024),
            None => (size.trim().strip_suffix('M')?, 1 << 20),
        };
        let kind = file("type").trim().to_owned();
        Some(CpuCache {
            level: file("level").trim().parse().ok()?,
            kind,
            bytes: number.parse::<u64>().ok()? * factor,
        })
    };
    (0..8).map_while(read).collect()
}

fn available() -> Option<u64> {
    let meminfo = text("/proc/meminfo");
    let kib: u64 = field(&meminfo, "MemAvailable")?
        .strip_suffix(" kB")?
        .parse()
        .ok()?;
    Some(kib * 1024)
}

/// Contents of a file, or nothing where there is no such file.
fn text(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// The value of the line `name: value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim())
}

/// The current time in UTC, as `2026-01-31T23:59:59Z`.
pub fn now() -> String {
    date(
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs()),
    )
}

/// Date of a number of seconds since 1970. Years are counted from March, so that a leap day is the
/// last day of its year.
fn date(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = (
        era * 400 + year + u64::from(month >= 10),
        if month < 10 { month + 3 } else { month - 9 },
    );
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (1_798_761_599, "2026-12-31T23:59:59Z"),
        ] {
            assert_eq!(date(seconds), expected);
        }
    }
}
