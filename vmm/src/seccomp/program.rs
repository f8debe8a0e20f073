//! Filters as BPF programs. What the kernel does with one when it is installed (checks, translation, a trial of every system call
//! number) costs time that every start of a VMM pays, so programs are short: a binary search for the number, then one
//! instruction for each allowed value of an argument. See `docs/adr/0002-seccomp-programs.md`.

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW,
    SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS, seccomp_data, sock_filter,
};

use super::calls::{Call, Uses};

/// `AUDIT_ARCH_X86_64`: the system calls of 32-bit programs have other numbers.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;

/// A jump's distance is a byte: a table has grown beyond what one search can hold.
#[derive(Debug, thiserror::Error)]
#[error("a seccomp filter has become too long for its jumps")]
pub struct TooLong;

/// Makes the program that allows the uses of system calls in `tables` and kills the process at everything else.
pub(super) fn compile(tables: &[&[Call]]) -> Result<Vec<sock_filter>, TooLong> {
    let calls = tables.iter().copied().flatten();
    let mut uses: Vec<(u32, &Uses)> = calls.map(|call| (number(call.number), &call.uses)).collect();
    uses.sort_by_key(|(number, _)| *number);

    let mut program = Backwards(Vec::with_capacity(256));
    let (kill, allow) = (program.end(SECCOMP_RET_KILL_PROCESS), program.end(SECCOMP_RET_ALLOW));
    let mut checks = Vec::with_capacity(uses.len());
    for uses in uses.chunk_by(|(a, _), (b, _)| a == b) {
        let mut next = kill;
        for (_, uses) in uses {
            next = program.check(uses, allow, next)?;
        }
        checks.push((uses[0].0, next));
    }
    // Nearer ones, for the search. Without anything to search for, it is `kill` that comes next.
    let (near, kill) = (program.end(SECCOMP_RET_ALLOW), program.end(SECCOMP_RET_KILL_PROCESS));
    for (_, check) in checks.iter_mut().filter(|(_, check)| *check == allow) {
        *check = near;
    }
    let search = program.search(&checks, kill)?;
    debug_assert_eq!(search, program.here());
    let load = program.load(std::mem::offset_of!(seccomp_data, nr));
    let kill = program.end(SECCOMP_RET_KILL_PROCESS);
    program.branch(BPF_JEQ, ARCHITECTURE, load, kill)?;
    program.load(std::mem::offset_of!(seccomp_data, arch));
    program.0.reverse();
    Ok(program.0)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // there are some hundred system calls
const fn number(call: libc::c_long) -> u32 {
    call as u32
}

/// An instruction, by the number of those behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Label(usize);

/// A program that is written from its end, since jumps only go forward: where they go is then known.
struct Backwards(Vec<sock_filter>);

impl Backwards {
    /// The instruction that was written last.
    fn here(&self) -> Label {
        Label(self.0.len() - 1)
    }

    fn put(&mut self, code: u32, k: u32, jt: u8, jf: u8) -> Label {
        let code = u16::try_from(code).expect("codes have 16 bits");
        self.0.push(sock_filter { code, jt, jf, k });
        self.here()
    }

    fn end(&mut self, action: u32) -> Label {
        self.put(BPF_RET | BPF_K, action, 0, 0)
    }

    /// Loads 32 bits of `struct seccomp_data`.
    fn load(&mut self, offset: usize) -> Label {
        self.put(BPF_LD | BPF_W | BPF_ABS, u32::try_from(offset).expect("64 bytes"), 0, 0)
    }

    fn branch(&mut self, comparison: u32, value: u32, yes: Label, no: Label) -> Result<Label, TooLong> {
        let ahead = |label: Label| u8::try_from(self.here().0 - label.0).map_err(|_| TooLong);
        let (yes, no) = (ahead(yes)?, ahead(no)?);
        Ok(self.put(BPF_JMP | comparison | BPF_K, value, yes, no))
    }

    /// What is to be done once the number is known. `next` is the check of other uses of the same call.
    fn check(&mut self, uses: &Uses, allow: Label, next: Label) -> Result<Label, TooLong> {
        match uses {
            Uses::Any => Ok(allow),
            Uses::Missing => Ok(self.end(SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned())),
            Uses::Where { argument, mask, values } => {
                let mut next = next;
                for value in values.iter().rev() {
                    next = self.branch(BPF_JEQ, *value, allow, next)?;
                }
                if *mask != u32::MAX {
                    self.put(BPF_ALU | BPF_AND | BPF_K, *mask, 0, 0);
                }
                // The lower half of the argument, on a little-endian machine.
                let at = std::mem::offset_of!(seccomp_data, args) + size_of::<u64>() * usize::from(*argument);
                Ok(self.load(at))
            }
        }
    }

    /// The search for the number among those of `checks`, which are sorted.
    fn search(&mut self, checks: &[(u32, Label)], kill: Label) -> Result<Label, TooLong> {
        match checks {
            [] => Ok(kill),
            [(number, check)] => self.branch(BPF_JEQ, *number, *check, kill),
            _ => {
                let (low, high) = checks.split_at(checks.len() / 2);
                let high_start = high[0].0;
                let high = self.search(high, kill)?;
                let low = self.search(low, kill)?;
                self.branch(BPF_JGE, high_start, high, low)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the kernel would do: the program's answer to a call with these low halves of arguments.
    fn run(program: &[sock_filter], architecture: u32, number: u32, arguments: [u32; 6]) -> u32 {
        let mut data = [0; 64];
        data[..4].copy_from_slice(&number.to_le_bytes());
        data[4..8].copy_from_slice(&architecture.to_le_bytes());
        for (at, argument) in (16..).step_by(8).zip(arguments) {
            data[at..at + 4].copy_from_slice(&argument.to_le_bytes());
        }
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            let branch = |taken| usize::from(if taken { jt } else { jf });
            at += 1;
            match u32::from(code) {
                code if code == BPF_RET | BPF_K => return k,
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    let k = k as usize;
                    accumulator = u32::from_le_bytes(data[k..k + 4].try_into().unwrap());
                }
                code if code == BPF_ALU | BPF_AND | BPF_K => accumulator &= k,
                code if code == BPF_JMP | BPF_JEQ | BPF_K => at += branch(accumulator == k),
                code if code == BPF_JMP | BPF_JGE | BPF_K => at += branch(accumulator >= k),
                code => panic!("code {code:#x}"),
            }
        }
    }

    fn expected(calls: &[Call], number: u32, arguments: [u32; 6]) -> u32 {
        let allows = |call: &&Call| match &call.uses {
            Uses::Any => true,
            Uses::Missing => false,
            Uses::Where { argument, mask, values } => {
                values.contains(&(arguments[usize::from(*argument)] & mask))
            }
        };
        if calls.iter().filter(|call| self::number(call.number) == number).any(|call| allows(&call)) {
            SECCOMP_RET_ALLOW
        } else if number == 61 {
            SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned()
        } else {
            SECCOMP_RET_KILL_PROCESS
        }
    }

    fn call() -> impl Strategy<Value = Call> {
        const VALUES: [&[u32]; 4] = [&[0], &[1, 2, 3], &[5, 1, 9, 12], &[0xae80, u32::MAX]];
        let uses = prop_oneof![
            3 => Just(None),
            2 => (0..6u8, prop::sample::select(vec![u32::MAX, 4, 0x7f]), prop::sample::select(VALUES.to_vec())).prop_map(Some),
        ];
        (0..60i64, uses).prop_map(|(number, uses)| {
            let uses =
                uses.map_or(Uses::Any, |(argument, mask, values)| Uses::Where { argument, mask, values });
            Call { number, uses }
        })
    }

    proptest! {
        #[test]
        fn programs_allow_what_their_tables_do(
            calls in prop::collection::vec(call(), 0..40),
            tries in prop::collection::vec((0..70u32, prop::array::uniform6(0..13u32)), 100),
        ) {
            // As in the tables: a call is open in all its uses or in some.
            let mut calls = calls;
            let open: Vec<_> = calls.iter().filter(|call| matches!(call.uses, Uses::Any)).map(|call| call.number).collect();
            calls.retain(|call| matches!(call.uses, Uses::Any) || !open.contains(&call.number));
            calls.push(Call { number: 61, uses: Uses::Missing });
            let program = compile(&[&calls]).unwrap();
            for (number, arguments) in tries {
                prop_assert_eq!(run(&program, ARCHITECTURE, number, arguments), expected(&calls, number, arguments));
                prop_assert_eq!(run(&program, 0x4000_0003, number, arguments), SECCOMP_RET_KILL_PROCESS);
            }
        }
    }

    #[test]
    fn the_numbers_of_x32_are_not_those_of_x86_64() {
        let program = compile(&[]).unwrap();
        assert_eq!(
            run(&program, ARCHITECTURE, 1, [0; 6]),
            SECCOMP_RET_KILL_PROCESS,
            "an empty table allows nothing"
        );
        let program = compile(&[&[Call { number: 1, uses: Uses::Any }]]).unwrap();
        assert_eq!(run(&program, ARCHITECTURE, 1, [0; 6]), SECCOMP_RET_ALLOW);
        assert_eq!(run(&program, ARCHITECTURE, 1 | 0x4000_0000, [0; 6]), SECCOMP_RET_KILL_PROCESS);
    }
}
