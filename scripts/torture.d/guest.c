/* The first program of a machine without anything else: writes to its disk for as many seconds as the kernel's command line says
 * (seconds=N), past its own cache and flushed now and then, reads what it has written, compares at last all of it, and says
 * "right: N requests" or "wrong: …" on the console. /module-0, /module-1, … are what the disk takes. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 65536, BLOCKS = 4096, WORDS = BLOCK / 8 };

static uint32_t written[BLOCKS];
static uint64_t *buffer;

static void end(void)
{
    fflush(stdout);
    sync();
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

static void wrong(const char *what, uint64_t block)
{
    printf("wrong: %s at block %llu: %s\n", what, (unsigned long long)block, strerror(errno));
    end();
}

static uint64_t word(uint64_t block, uint64_t round, uint64_t at)
{
    uint64_t x = block * 0x9e3779b97f4a7c15u + round * 0xbf58476d1ce4e5b9u + at * 0x94d049bb133111ebu;
    return (x ^ x >> 29) * 0xbf58476d1ce4e5b9u;
}

static void compare(int disk, uint64_t block)
{
    if (pread(disk, buffer, BLOCK, block * BLOCK) != BLOCK)
        wrong("reading", block);
    for (uint64_t at = 0; at < WORDS; at++) {
        uint64_t expected = written[block] ? word(block, written[block], at) : 0;
        if (buffer[at] != expected) {
            errno = 0;
            wrong("other bytes than were written", block);
        }
    }
}

int main(void)
{
    char text[4096] = "", path[64];
    mkdir("/dev", 0755);
    mkdir("/proc", 0755);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    dup2(console, 1);
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int number = 0;; number++) {
        snprintf(path, sizeof path, "/module-%d", number);
        int module = open(path, O_RDONLY);
        if (module < 0)
            break;
        if (syscall(SYS_finit_module, module, "", 0) != 0 && errno != EEXIST)
            wrong("loading a module", number);
        close(module);
    }
    int cmdline = open("/proc/cmdline", O_RDONLY);
    read(cmdline, text, sizeof text - 1);
    char *given = strstr(text, "seconds=");
    time_t until = time(NULL) + (given ? atoi(given + 8) : 10);
    int disk = -1;
    for (int tries = 0; disk < 0 && tries < 100; tries++) {
        disk = open("/dev/vda", O_RDWR | O_DIRECT);
        if (disk < 0)
            usleep(100000);
    }
    if (disk < 0 || posix_memalign((void **)&buffer, 4096, BLOCK) != 0)
        wrong("opening the disk", 0);
    uint64_t requests = 0, random = 88172645463325252u;
    for (uint32_t round = 1; time(NULL) < until; round++) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        uint64_t block = random % BLOCKS;
        for (uint64_t at = 0; at < WORDS; at++)
            buffer[at] = word(block, round, at);
        if (pwrite(disk, buffer, BLOCK, block * BLOCK) != BLOCK)
            wrong("writing", block);
        written[block] = round;
        if (round % 16 == 0 && fdatasync(disk) != 0)
            wrong("flushing", block);
        compare(disk, random / BLOCKS % BLOCKS);
        requests += 2;
    }
    for (uint64_t block = 0; block < BLOCKS; block++)
        compare(disk, block);
    printf("right: %llu requests\n", (unsigned long long)requests + BLOCKS);
    end();
}
