# What programs expect of efivarfs, a line for each thing tried: what it is and how it went. The bench compares two machines.
# No modules: the RAM disk has none.
sub O_RDONLY { 0 }
sub O_WRONLY { 1 }
sub O_RDWR { 2 }
sub O_CREAT { 0100 }
sub O_APPEND { 02000 }

my $folder = '/sys/firmware/efi/efivars';
my $guid = '3e0c7c1d-5a8b-4a57-9d0c-c21b6a0c1f77';
my $stored = pack 'V', 7;    # non-volatile, boot services, runtime
my ($get_flags, $set_flags, $immutable) = (0x80086601, 0x40086602, 0x10);

sub path { "$folder/$_[0]-$guid" }

# Linux protects some variables from being removed by mistake.
sub unlock {
    open my $file, '<', $_[0] or return;
    my $flags = pack 'q', 0;
    ioctl $file, $get_flags, $flags or return;
    ioctl $file, $set_flags, pack 'q', unpack('q', $flags) & ~$immutable;
}

# One write, as the kernel takes it; "ok" or the error.
sub put {
    my ($path, $data, $more) = @_;
    unlock $path;
    sysopen my $file, $path, O_WRONLY() | O_CREAT() | ($more // 0), 0644 or return "open: $!";
    my $written = syswrite $file, $data;
    return defined $written ? ($written == length $data ? 'ok' : "short: $written") : "write: $!";
}

sub content {
    sysopen my $file, $_[0], O_RDONLY() or return "open: $!";
    my $length = sysread $file, my $data, 65536;
    return defined $length ? unpack 'H*', $data : "read: $!";
}

sub gone { -e $_[0] ? 'still there' : 'gone' }

sub listed {
    opendir my $entries, $folder or return "open: $!";
    return join ' ', sort grep { /$guid/ } readdir $entries;
}

my $path = path 'Plain';
print 'create: ', put($path, $stored . 'a'), ', ', content($path), ', size ', -s $path, "\n";
print 'overwrite: ', put($path, $stored . 'bcd'), ', ', content($path), "\n";
print 'append: ', put($path, pack('V', 0x47) . 'ef', O_APPEND()), ', ', content($path), "\n";
print 'other attributes: ', put($path, pack('V', 3) . 'x'), ', ', content($path), "\n";
print 'reserved attributes: ', put($path, pack('V', 0x80000007) . 'x'), ', ', content($path), "\n";
print 'short of attributes: ', put($path, 'xy'), ', ', content($path), "\n";
unlock $path;
print 'remove: ', (unlink($path) ? 'ok' : "$!"), ', ', gone($path), "\n";

$path = path 'Empty';
sysopen my $empty, $path, O_WRONLY() | O_CREAT(), 0644 or print "empty: $!\n";
print 'empty, open: ', content($path), "\n";
close $empty;
print 'empty, closed: size ', -s $path, ', ', content($path), "\n";
unlock $path;
unlink $path;
print 'empty, removed: ', gone($path), "\n";

$path = path 'Nothing';
print 'no data: ', put($path, $stored . 'a'), ', ', put($path, $stored), ', ', gone($path), "\n";

$path = path 'Open';
put $path, $stored . 'a';
unlock $path;
sysopen my $open, $path, O_RDWR() or print "open: $!\n";
print 'removed while open: ', (unlink($path) ? 'ok' : "$!"), "\n";
my $read = sysread $open, my $data, 64;
print 'read of removed: ', (defined $read ? $read : "$!"), "\n";
print 'write to removed: ', (defined syswrite($open, $stored . 'b') ? 'ok' : "$!"), "\n";
close $open;
print 'after that: ', gone($path), "\n";

$path = path 'Large';
my $large = $stored . join '', map { chr($_ % 251) } 1 .. 1500;
print 'large: ', put($path, $large), ', ', (content($path) eq unpack('H*', $large) ? 'the same' : 'another'), "\n";
print 'too large: ', put(path('Larger'), $stored . 'x' x 60000), ', ', gone(path 'Larger'), "\n";

for my $name ('abc', 'dump-type0-11-1-1362436005', '1234', '-', 'x' x 200, "\xc3\xa4") {
    my $path = path $name;
    print 'name ', unpack('H*', substr $name, 0, 30), ': ', put($path, $stored . 'n'), ', ', content($path), "\n";
    unlock $path;
    unlink $path;
}
for my $name ('abc', 'abc-', $guid, "-$guid", 'abc-' . substr($guid, 1), "abc-${guid}0", "abc-g$guid", "abc_$guid",
    'abc-' . ($guid =~ tr/-/:/r)) {
    my $at = "$folder/$name";
    my $result = sysopen(my $file, $at, O_WRONLY() | O_CREAT(), 0644) ? 'taken' : "$!";
    print "bad name $name: $result\n";
    unlock $at;
    unlink $at;
}

# Twenty at once, and what a second mount makes of them.
put path("Many$_"), $stored . chr $_ for 1 .. 20;
print 'listed: ', listed, "\n";
system 'umount', $folder;
system 'mount', '-t', 'efivarfs', 'efivarfs', $folder;
print 'mounted again: ', listed, "\n";
print 'read again: ', join(' ', map { content path "Many$_" } 1 .. 20), "\n";
for (map { path "Many$_" } 1 .. 20) { unlock $_; unlink $_ }
# A write to what was removed while open makes it again.
for (map { path $_ } 'Large', 'Open') { unlock $_; unlink $_ }
print 'all removed: ', listed, "\n";
