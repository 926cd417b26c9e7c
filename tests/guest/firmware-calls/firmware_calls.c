// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * What the guest's programs cannot ask of Debian's kernel for x86, which has neither rtc-efi nor efi_test: a clock that is the
 * firmware's, by GetTime, SetTime, GetWakeupTime and SetWakeupTime; and how long firmware's calls take, and for how long
 * interrupts wait meanwhile.
 *
 *   /dev/rtcN                    the clock, named "firmware-clock"
 *   /proc/firmware-calls         written "NAME COUNT": calls the service so often; read: what it took
 */
#include <linux/delay.h>
#include <linux/efi.h>
#include <linux/hrtimer.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/proc_fs.h>
#include <linux/rtc.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/sort.h>
#include <linux/uaccess.h>

#define COUNT_MAX 10000
#define TICK_NS 500000

static int from_efi(const efi_time_t *from, struct rtc_time *to)
{
	*to = (struct rtc_time) {
		.tm_year = from->year - 1900,
		.tm_mon = from->month - 1,
		.tm_mday = from->day,
		.tm_hour = from->hour,
		.tm_min = from->minute,
		.tm_sec = from->second,
	};
	return rtc_valid_tm(to);
}

static efi_time_t to_efi(const struct rtc_time *from)
{
	return (efi_time_t) {
		.year = from->tm_year + 1900,
		.month = from->tm_mon + 1,
		.day = from->tm_mday,
		.hour = from->tm_hour,
		.minute = from->tm_min,
		.second = from->tm_sec,
		.timezone = EFI_UNSPECIFIED_TIMEZONE,
	};
}

static int read_time(struct device *dev, struct rtc_time *tm)
{
	efi_time_t now;
	efi_time_cap_t capabilities;
	efi_status_t status = efi.get_time(&now, &capabilities);

	return status == EFI_SUCCESS ? from_efi(&now, tm) : efi_status_to_err(status);
}

static int set_time(struct device *dev, struct rtc_time *tm)
{
	efi_time_t now = to_efi(tm);

	return efi_status_to_err(efi.set_time(&now));
}

static int read_alarm(struct device *dev, struct rtc_wkalrm *alarm)
{
	efi_time_t at;
	efi_bool_t enabled, pending;
	efi_status_t status = efi.get_wakeup_time(&enabled, &pending, &at);

	if (status != EFI_SUCCESS)
		return efi_status_to_err(status);
	alarm->enabled = enabled;
	alarm->pending = pending;
	return from_efi(&at, &alarm->time);
}

static int set_alarm(struct device *dev, struct rtc_wkalrm *alarm)
{
	efi_time_t at = to_efi(&alarm->time);

	return efi_status_to_err(efi.set_wakeup_time(alarm->enabled, &at));
}

static const struct rtc_class_ops clock_ops = {
	.read_time = read_time,
	.set_time = set_time,
	.read_alarm = read_alarm,
	.set_alarm = set_alarm,
};

/* A timer on each CPU: how late it is, is how long interrupts waited. */
struct ticker {
	struct hrtimer timer;
	s64 latest;
};
static DEFINE_PER_CPU(struct ticker, tickers);

static enum hrtimer_restart tick(struct hrtimer *timer)
{
	struct ticker *this = container_of(timer, struct ticker, timer);
	s64 late = ktime_to_ns(ktime_sub(ktime_get(), hrtimer_get_expires(timer)));

	this->latest = max(this->latest, late);
	hrtimer_forward_now(timer, ns_to_ktime(TICK_NS));
	return HRTIMER_RESTART;
}

static void start_ticking(void *unused)
{
	struct ticker *this = this_cpu_ptr(&tickers);

	this->latest = 0;
	hrtimer_init(&this->timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED_HARD);
	this->timer.function = tick;
	hrtimer_start(&this->timer, ns_to_ktime(TICK_NS), HRTIMER_MODE_REL_PINNED_HARD);
}

static s64 stop_ticking(void)
{
	s64 latest = 0;
	int cpu;

	for_each_online_cpu(cpu) {
		struct ticker *this = per_cpu_ptr(&tickers, cpu);

		hrtimer_cancel(&this->timer);
		latest = max(latest, this->latest);
	}
	return latest;
}

static efi_guid_t ours = EFI_GUID(0x3e0c7c1d, 0x5a8b, 0x4a57, 0x9d, 0x0c, 0xc2, 0x1b, 0x6a, 0x0c, 0x1f, 0x78);
static efi_guid_t global = EFI_GLOBAL_VARIABLE_GUID;

static efi_status_t get_time_once(u64 round)
{
	efi_time_t now;
	efi_time_cap_t capabilities;

	return efi.get_time(&now, &capabilities);
}

static efi_status_t get_variable_once(u64 round)
{
	u8 data[512];
	unsigned long size = sizeof(data);
	u32 attributes;

	return efi.get_variable(L"BootOrder", &global, &attributes, &size, data);
}

static efi_status_t set_variable_once(u64 round)
{
	u32 attributes =
		EFI_VARIABLE_NON_VOLATILE | EFI_VARIABLE_BOOTSERVICE_ACCESS | EFI_VARIABLE_RUNTIME_ACCESS;

	return efi.set_variable(L"Timed", &ours, attributes, sizeof(round), &round);
}

/* What the timers are late by without firmware. */
static efi_status_t no_call(u64 round)
{
	usleep_range(900, 1000);
	return EFI_SUCCESS;
}

static const struct {
	const char *name;
	efi_status_t (*once)(u64 round);
} services[] = {
	{ "GetTime", get_time_once },
	{ "GetVariable", get_variable_once },
	{ "SetVariable", set_variable_once },
	{ "nothing", no_call },
};

static DEFINE_MUTEX(lock);
static char result[128];

static int compare(const void *a, const void *b)
{
	u64 left = *(const u64 *)a, right = *(const u64 *)b;

	return left < right ? -1 : left > right;
}

static int measure(efi_status_t (*once)(u64 round), unsigned int count)
{
	u64 *took = kvcalloc(count, sizeof(*took), GFP_KERNEL);
	efi_status_t status = EFI_SUCCESS;
	unsigned int i;
	s64 latest;

	if (!took)
		return -ENOMEM;
	for (i = 0; i < count && status == EFI_SUCCESS; i++) {
		u64 start = ktime_get_ns();

		status = once(start);
		took[i] = ktime_get_ns() - start;
	}
	/* Again: timers take their part of the time. */
	on_each_cpu(start_ticking, NULL, 1);
	for (i = 0; i < count && status == EFI_SUCCESS; i++)
		status = once(i);
	latest = stop_ticking();
	sort(took, count, sizeof(*took), compare, NULL);
	snprintf(result, sizeof(result), "median %llu least %llu held-off %lld\n", took[count / 2], took[0], latest);
	kvfree(took);
	return efi_status_to_err(status);
}

static ssize_t run(struct file *file, const char __user *from, size_t size, loff_t *at)
{
	char text[32] = "", name[16];
	unsigned int count;
	int i, error = -EINVAL;

	if (size >= sizeof(text) || copy_from_user(text, from, size))
		return -EINVAL;
	if (sscanf(text, "%15s %u", name, &count) != 2 || !count || count > COUNT_MAX)
		return -EINVAL;
	mutex_lock(&lock);
	for (i = 0; i < ARRAY_SIZE(services); i++)
		if (!strcmp(services[i].name, name))
			error = measure(services[i].once, count);
	mutex_unlock(&lock);
	return error ? error : size;
}

static int show(struct seq_file *out, void *unused)
{
	mutex_lock(&lock);
	seq_puts(out, result);
	mutex_unlock(&lock);
	return 0;
}

static int open_result(struct inode *inode, struct file *file)
{
	return single_open(file, show, NULL);
}

static const struct proc_ops ops = {
	.proc_open = open_result,
	.proc_read = seq_read,
	.proc_lseek = seq_lseek,
	.proc_write = run,
	.proc_release = single_release,
};

static int probe(struct platform_device *device)
{
	struct rtc_device *rtc = devm_rtc_allocate_device(&device->dev);

	if (IS_ERR(rtc))
		return PTR_ERR(rtc);
	rtc->ops = &clock_ops;
	rtc->range_min = RTC_TIMESTAMP_BEGIN_1900;
	rtc->range_max = RTC_TIMESTAMP_END_9999;
	/* Otherwise the kernel shows no alarm. */
	device_init_wakeup(&device->dev, true);
	return devm_rtc_register_device(rtc);
}

static struct platform_driver driver = {
	.probe = probe,
	.driver = { .name = "firmware-clock" },
};
static struct platform_device *device;

static int __init start(void)
{
	int error;

	if (!efi_enabled(EFI_RUNTIME_SERVICES))
		return -ENODEV;
	if (!proc_create("firmware-calls", 0600, NULL, &ops))
		return -ENOMEM;
	error = platform_driver_register(&driver);
	if (error)
		goto no_driver;
	device = platform_device_register_simple("firmware-clock", PLATFORM_DEVID_NONE, NULL, 0);
	if (IS_ERR(device)) {
		error = PTR_ERR(device);
		goto no_device;
	}
	return 0;
no_device:
	platform_driver_unregister(&driver);
no_driver:
	remove_proc_entry("firmware-calls", NULL);
	return error;
}

static void __exit end(void)
{
	platform_device_unregister(device);
	platform_driver_unregister(&driver);
	remove_proc_entry("firmware-calls", NULL);
}

module_init(start);
module_exit(end);
MODULE_DESCRIPTION("A clock that is the firmware's, and the time its calls take");
MODULE_LICENSE("Dual MIT/GPL");
