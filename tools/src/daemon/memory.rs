//! Keeps the daemon small: few malloc arenas, freed memory given back.

/// Call before the first thread starts.
pub fn limit_arenas() {
    #[cfg(target_env = "gnu")]
    {
        const ARENAS: libc::c_int = 2;
        const MMAP_THRESHOLD: libc::c_int = 256 * 1024;
        const TRIM_THRESHOLD: libc::c_int = 1024 * 1024;
        // SAFETY: mallopt takes two integers, and no other thread allocates yet.
        #[allow(unsafe_code)]
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, ARENAS);
            libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD);
            libc::mallopt(libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD);
        }
    }
}

/// Gives what is free back to the system, after large work.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: malloc_trim takes an integer and locks by itself.
        #[allow(unsafe_code)]
        unsafe {
            libc::malloc_trim(1024 * 1024);
        }
    }
}

/// Resident memory of this process, in bytes; 0 if unknown.
pub fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
