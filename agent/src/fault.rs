//! Faults on demand, for tests: only a build with the feature `fault-injection` has them.

/// Executes an invalid instruction when the kernel command line has `bulkhead.fault=ill`: the kernel kills PID 1 and
/// panics without the agent having had a word in it.
#[cfg(feature = "fault-injection")]
pub(crate) fn when_ready(command_line: &str) {
    if command_line.split_ascii_whitespace().any(|word| word == "bulkhead.fault=ill") {
        // SAFETY: it ends this process, which is what the build is for.
        unsafe { std::arch::asm!("ud2") };
    }
}

/// Does nothing any more, for ever, when the process to be executed has the argument `bulkhead.fault=hang`: what is connected
/// stays connected, the guest's kernel and its containers go on.
#[cfg(feature = "fault-injection")]
pub(crate) fn when_asked(process: &[u8]) {
    let argument = br#""bulkhead.fault=hang""#;
    while process.windows(argument.len()).any(|bytes| bytes == argument) {
        // The runtime has this thread alone.
        std::thread::park();
    }
}

#[cfg(not(feature = "fault-injection"))]
pub(crate) fn when_ready(_command_line: &str) {}

#[cfg(not(feature = "fault-injection"))]
pub(crate) fn when_asked(_process: &[u8]) {}
