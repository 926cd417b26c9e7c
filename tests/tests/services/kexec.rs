//! A guest that puts another kernel in the place of its own.

use std::path::{Path, PathBuf};

use tests::machine::{Boot, Spec};
use tests::{images, initrd, paths};

use super::{POLICIES, boot, reads_back, write};

/// Loads the kernel that the disk has in the place of the running one, and starts it. Debian's kexec needs libraries that no
/// other program here does; Perl is on every Debian.
const KEXEC: &str = r#"mount -t vfat /dev/sda1 /mnt
cat >/tmp/kexec <<'END'
open my $kernel, '<', '/mnt/vmlinuz' or die "kernel: $!";
open my $initrd, '<', '/mnt/initrd.img' or die "initrd: $!";
open my $file, '<', '/proc/cmdline' or die "cmdline: $!";
chomp(my $cmdline = <$file>);
my ($kexec_file_load, $reboot) = (320, 169);
syscall($kexec_file_load, fileno $kernel, fileno $initrd, length($cmdline) + 1, $cmdline, 0) == 0 or die "load: $!";
syscall($reboot, 0xfee1dead, 0x28121969, 0x45584543, 0);
die "reboot: $!";
END
/usr/bin/perl /tmp/kexec"#;

/// The RAM disk with Perl.
fn initrd_with_perl(folder: &Path) -> PathBuf {
    images::build_initrd().expect("RAM disk");
    let initrd_with = folder.join("initrd.img");
    initrd::add_program(&paths::initrd(), "/usr/bin/perl".as_ref(), &initrd_with).unwrap();
    initrd_with
}

/// A CPU can be stopped and started again. A kernel that the guest starts itself finds all CPUs, and firmware as the first one
/// did, and what waits goes on waiting.
#[test]
#[ignore = "takes two minutes"]
fn firmware_is_there_after_kexec() {
    let folder = tempfile::tempdir().unwrap();
    let initrd_with = initrd_with_perl(folder.path());
    let config = folder.path().join("cordon.conf");
    std::fs::write(&config, POLICIES).unwrap();
    for boot_by in [Boot::Cordon, Boot::Native] {
        let config = (boot_by == Boot::Cordon).then(|| config.clone());
        let mut machine =
            boot(&Spec { boot: boot_by, initrd: initrd_with.clone(), config, ..Spec::default() });
        machine.check("touch /tmp/first").unwrap();
        // A CPU that goes and comes back.
        let online = "/sys/devices/system/cpu/cpu1/online";
        machine.check(&format!("echo 0 >{online} && test $(nproc) = 1 && echo 1 >{online}")).unwrap();
        machine.check("taskset 2 true && test $(nproc) = 2").unwrap();
        for name in ["Boot00C1", "Boot00D1"] {
            write(&mut machine, name).unwrap();
        }
        if let Err(error) = machine.restart_guest(KEXEC) {
            panic!("{boot_by:?}: {error:#}\n{}", machine.diagnosis());
        }
        machine.check("! test -e /tmp/first && test $(nproc) = 2").unwrap();
        for name in ["Boot00C1", "Boot00D1"] {
            assert!(reads_back(&mut machine, name), "{boot_by:?} {name}");
        }
        if boot_by == Boot::Cordon {
            write(&mut machine, "Boot00C0").unwrap_err();
            machine.check("cordon verify").unwrap();
        }
        machine.power_off().unwrap();
    }
}

/// A kernel for one CPU, at 1 MiB. CPUID, a while for what that may have set off on other CPUs, and a sign of life.
const TINY_KERNEL: &str = concat!(
    "31c0",           // xor eax, eax
    "0fa2",           // cpuid
    "b900001000",     // mov ecx, 0x100000
    "f390",           // pause
    "ffc9",           // dec ecx
    "75fa",           // jnz to the pause
    "488d3518000000", // lea rsi, [rip + 24]: the text
    "66bafd03",       // mov dx, 0x3fd
    "ec",             // in al, dx
    "a820",           // test al, 0x20
    "74f7",           // jz to the mov
    "66baf803",       // mov dx, 0x3f8
    "ac",             // lodsb
    "84c0",           // test al, al
    "7403",           // jz past the jmp
    "ee",             // out dx, al
    "ebeb",           // jmp to the mov of 0x3fd
    "f4",             // hlt
    "ebfd",           // jmp to it
);
const SIGN_OF_LIFE: &str = "the tiny kernel runs";

/// A CPU that the guest stopped does not run on in memory that a new kernel has taken: here, where its code and page tables
/// were.
#[test]
#[ignore = "two more machines; `make test-all` runs it"]
fn a_stopped_cpu_does_not_run_in_a_new_kernels_memory() {
    let folder = tempfile::tempdir().unwrap();
    let initrd = initrd_with_perl(folder.path());
    for boot_by in [Boot::Cordon, Boot::Native] {
        let mut machine = boot(&Spec { boot: boot_by, initrd: initrd.clone(), ..Spec::default() });
        machine.check("test $(nproc) = 2").unwrap();
        let script = format!(
            r#"cat >/tmp/kexec <<'END'
my $code = pack 'H* Z*', '{TINY_KERNEL}', "{SIGN_OF_LIFE}\r\n";
open my $map, '<', '/proc/iomem' or die "iomem: $!";
my @kernel = map {{ /([0-9a-f]+)-([0-9a-f]+) : Kernel (?:code|data|bss)/ ? (hex $1, hex $2) : () }} <$map>;
my ($first, $last) = @kernel[0, -1];
my $size = ($last - $first | 0xfff) + 1;
my ($kexec_load, $reboot) = (246, 169);
my $segments = pack 'P Q3 Q4', $code, length $code, 0x100000, 0x1000, 0, 0, $first, $size;
syscall($kexec_load, 0x100000, 2, $segments, 0) == 0 or die "load: $!";
syscall($reboot, 0xfee1dead, 0x28121969, 0x45584543, 0);
die "reboot: $!";
END
/usr/bin/perl /tmp/kexec"#
        );
        machine.begin(&script).unwrap();
        if let Err(error) = machine.wait_console(|text| text.contains(SIGN_OF_LIFE).then_some(())) {
            panic!("{boot_by:?}: {error:#}\n{}", machine.diagnosis());
        }
    }
}
