# Entry of the MLE in the state that SENTER and SINIT leave.
#
#   ebx   physical address of senter_entry      cs   flat 32-bit code
#   ds    flat data, as Linux counts on too     es, ss, fs, gs, esp, all other registers: undefined
#   cr0   PE, NE; no paging, WP, AM             cr4  SMXE alone; efer 0
#   gdtr  SINIT's, not to be used               idtr whatever the gap left
#   MTRRs cover SINIT alone: other memory is uncached
#   SMI, NMI, INIT, interrupts masked; other CPUs wait for MLE.JOIN
#
# Spec: [TXT] "Initialization of the MLE", "MLE Initialization State".
#
# What SINIT vouches for is the pages of the image, one by one: their place is the page tables' choice, which is the gap's.
# So up to "pages" nothing is used but this page, registers of TXT and the heap, which devices can't reach (DPR). There it is
# known that the image lies in one piece, and that all of the MLE region is in the protected range that SINIT set.
#
# To mle_relocate in long mode, with rbx = base of the image, r12 = 0.

.section .mle.senter, "ax"
.code32
# Offsets from the image's start: the linker script puts this section there.
.set head, . - {at}
.set entry, senter_entry - head
.set no_idt, senter_no_idt - head
.set gdt, senter_gdt - head
.set gdt_limit, senter_gdt_end - senter_gdt - 1
.set gdtr, senter_gdtr - head
.set jump, senter_jump - head
.set long, senter_long - head

# Header by which SINIT knows the image.
# Spec: [TXT] "MLE Header": the UUID occurs once in the file.
.globl senter_txt_header
senter_txt_header:
    .long {uuid0}, {uuid1}, {uuid2}, {uuid3}
    .long 52                                    # HeaderLen
    .long {header_version}
    .long entry                                 # EntryPoint
    .long 0                                     # FirstValidPage
    .long 0                                     # MleStart
    .long senter_file_end                          # MleEnd
    .long {capabilities}
    .long 0, 0                                  # CmdlineStart, CmdlineEnd

senter_entry:
    cli
    cld
    sub     ebx, offset entry
    # No exception may vector through a table we did not write: with no IDT it is a shutdown.
    lidt    cs:[ebx + no_idt]
    lea     eax, [ebx + gdt]
    mov     [ebx + gdtr + 2], eax
    lgdt    [ebx + gdtr]
    lea     eax, [ebx + long]
    mov     [ebx + jump], eax
    mov     eax, {data}
    mov     ds, eax
    mov     es, eax
    mov     ss, eax
    xor     eax, eax
    mov     fs, eax
    mov     gs, eax
    lldt    ax

    # After SENTER, with the private registers open.
    mov     ecx, {not_senter}
    mov     eax, [{private} + {sts}]
    and     eax, {sts_wanted}
    cmp     eax, {sts_wanted}
    jne     senter_fail

    # The third table of the heap: esi, of {os_sinit_min} bytes at least, its size word included.
    mov     ecx, {bad_heap}
    cmp     dword ptr [{private} + {heap_base} + 4], 0
    jne     senter_fail
    cmp     dword ptr [{private} + {heap_size} + 4], 0
    jne     senter_fail
    mov     esi, [{private} + {heap_base}]
    mov     edi, [{private} + {heap_size}]      # bytes left
    mov     edx, 2
1:  cmp     edi, 8
    jb      senter_fail
    cmp     dword ptr [esi + 4], 0
    jne     senter_fail
    mov     eax, [esi]
    cmp     eax, 8
    jb      senter_fail
    sub     edi, eax
    jb      senter_fail
    add     esi, eax
    jc      senter_fail
    dec     edx
    jnz     1b
    cmp     edi, {os_sinit_min}
    jb      senter_fail
    cmp     dword ptr [esi + 4], 0
    jne     senter_fail
    cmp     dword ptr [esi], {os_sinit_min}
    jb      senter_fail

    # The region, as long as our own header says, lies in the low protected range: ebx - base, then size - that.
    mov     ecx, {uncovered}
    cmp     dword ptr [esi + {pmr_low_base} + 4], 0
    jne     senter_fail
    cmp     dword ptr [esi + {pmr_low_size} + 4], 0
    jne     senter_fail
    mov     eax, ebx
    sub     eax, [esi + {pmr_low_base}]
    jb      senter_fail
    mov     edx, [esi + {pmr_low_size}]
    sub     edx, eax
    jb      senter_fail
    cmp     edx, [ebx + {region_size}]
    jb      senter_fail

    # Page i of the image is at ebx + i * 4096: one table maps all of them.
    mov     ecx, {bad_tables}
    lea     edi, [esi + {page_tables}]      # root pointer, first root entry, first directory entry
    mov     edx, 3
2:  cmp     dword ptr [edi + 4], 0
    jne     senter_fail
    mov     edi, [edi]
    cmp     edx, 3
    je      3f
    mov     eax, edi
    and     eax, 0x81                           # present, no large page
    cmp     eax, 1
    jne     senter_fail
3:  and     edi, 0xfffff000
    dec     edx
    jnz     2b
    mov     eax, ebx
    lea     ebp, [ebx + senter_file_end]
4:  mov     edx, [edi]
    test    edx, 1
    jz      senter_fail
    and     edx, 0xfffff000
    cmp     edx, eax
    jne     senter_fail
    cmp     dword ptr [edi + 4], 0
    jne     senter_fail
    add     edi, 8
    add     eax, 0x1000
    cmp     eax, ebp
    jb      4b

    # pages: from here on memory of the region is ours. What the file does not hold is zeroed.
    lea     edi, [ebx + senter_file_end]
    mov     ecx, offset senter_end
    sub     ecx, offset senter_file_end
    shr     ecx, 2
    xor     eax, eax
    rep stosd

    # First page tables, six pages at the start of what was zeroed: 0 to 4 GiB one to one, the last GiB uncached.
    lea     edi, [ebx + senter_file_end]
    lea     eax, [edi + 0x1000 + {present_write}]
    mov     [edi], eax
    lea     eax, [edi + 0x2000 + {present_write}]
    xor     ecx, ecx
5:  mov     [edi + ecx * 8 + 0x1000], eax
    add     eax, 0x1000
    inc     ecx
    cmp     ecx, 4
    jb      5b
    mov     eax, {present_write_large}
    xor     ecx, ecx
6:  cmp     ecx, 3 * 512
    jb      7f
    or      eax, {uncached}
7:  mov     [edi + ecx * 8 + 0x2000], eax
    add     eax, 0x200000
    inc     ecx
    cmp     ecx, 4 * 512
    jb      6b

    # What our page tables mean must not be the gap's choice.
    mov     ecx, {pat}
    mov     eax, {pat_low}
    mov     edx, {pat_high}
    wrmsr
    mov     cr3, edi
    mov     eax, {cr4}
    mov     cr4, eax
    mov     ecx, {efer}
    mov     eax, {efer_value}
    xor     edx, edx
    wrmsr
    mov     eax, {cr0}
    mov     cr0, eax
    jmp     fword ptr [ebx + jump]

# The number of what is wrong, ecx, is left for the next boot; then the platform is reset.
# Spec: [TXT] "TXT.ERRORCODE", "TXT.CMD.RESET".
senter_fail:
    mov     [{private} + {errorcode}], ecx
    mov     dword ptr [{private} + {errorcode} + 4], 0
    mov     eax, [{public} + {e2sts}]           # the writes are done when this has been read
    mov     dword ptr [{private} + {cmd_reset}], 1
8:  hlt
    jmp     8b

.code64
senter_long:
    mov     ebx, ebx
    xor     r12d, r12d
    jmp     mle_relocate

.balign 8
senter_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff                    # 08h: 32-bit code
    .quad 0x00cf93000000ffff                    # 10h: data
    .quad 0x00af9b000000ffff                    # 18h: 64-bit code
senter_gdt_end:
senter_gdtr:
    .word gdt_limit
    .long 0
senter_jump:
    .long 0
    .word {code64}
senter_no_idt:
    .word 0
    .long 0
