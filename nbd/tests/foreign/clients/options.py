# Run by nbdsh in the middle of a handshake, with a name asked for that is not there.
def outcome(option, *arguments):
    try:
        option(*arguments)
        return "OK"
    except nbd.Error as error:
        return error.errno or "refused"


names, contexts = [], []
assert h.opt_list(lambda name, description: names.append(name)) == 1 and names == ["disk0"], names
for option in (h.opt_info, h.opt_go):
    assert outcome(option) != "OK", "the export does not exist"
assert outcome(h.opt_list_meta_context, contexts.append) != "OK" and contexts == []

h.set_export_name("disk0")
h.opt_info()
assert h.get_size() == 64 << 20
before = [h.get_size(), h.is_read_only(), h.can_df(), h.can_fast_zero(), h.can_multi_conn()]
h.opt_list_meta_context(contexts.append)
assert sorted(contexts) == ["base:allocation", "qemu:allocation-depth"], contexts
h.add_meta_context("base:allocation")
h.add_meta_context("nosuch:context")
h.opt_go()
assert h.can_meta_context("base:allocation") and not h.can_meta_context("nosuch:context")
assert before == [h.get_size(), h.is_read_only(), h.can_df(), h.can_fast_zero(), h.can_multi_conn()]
assert len(h.pread(512, 0)) == 512
h.shutdown()
