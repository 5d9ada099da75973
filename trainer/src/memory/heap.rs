//! What the C library does with memory that a step gives back.

/// Has glibc keep the memory of tensors that are dropped, and hand it out again. Each step needs the same sizes, of megabytes
/// each: by default a thread's heap gives them back to the kernel, which clears every page again for the next
/// operation. A block of more than [`LARGEST`] still goes back at once, and so does more than [`KEPT`] at a heap's end.
///
/// Holds for the whole process, from the first call on. Elsewhere than on Linux with glibc it does nothing.
pub(crate) fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        let settings =
            [(libc::M_MMAP_THRESHOLD, LARGEST), (libc::M_TRIM_THRESHOLD, KEPT), (libc::M_TOP_PAD, GROWS_BY)];
        ONCE.call_once(|| {
            for (parameter, value) in settings {
                // SAFETY: mallopt takes two numbers, locks the heap by itself, and may be called at any time (mallopt(3)).
                #[allow(unsafe_code, reason = "a function of the C library")]
                let accepted = unsafe { libc::mallopt(parameter, value) };
                // What it does not know it leaves as it was: slower, and nothing worse.
                let _ = accepted;
            }
        });
    }
}

/// Bytes of the largest block that comes from a heap: what glibc itself goes up to.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGEST: i32 = 32 << 20;

/// Bytes at the end of a heap that are kept.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT: i32 = 256 << 20;

/// Bytes that a heap asks of the kernel beyond what it needs. Pages that nobody touches take no memory.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const GROWS_BY: i32 = 32 << 20;
