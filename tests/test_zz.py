import gc, threading
from .runs import *
from comfy.ldm.wan.model import WanModel
def test_x(tmp_path, tiny_models):
    model = load_model(tiny_models / "diffusion_models" / "tiny_wan.safetensors")
    data = write_data(tmp_path/"d","wan")
    gc.collect()
    before = {id(o) for o in gc.get_objects() if isinstance(o, WanModel)}
    j=finish(make_job(tmp_path/"j", model, data, make_config("KinoloomTrainWanLora"),"KinoloomTrainWanLora"),model)
    print("live threads", [t.name for t in threading.enumerate()])
    del j
    gc.collect()
    def refs(o, depth=0, seen=set()):
        if depth>7 or id(o) in seen: return
        seen.add(id(o))
        for r in gc.get_referrers(o):
            if r is locals() or type(r).__name__ in ("frame","list_iterator") : continue
            if isinstance(r, list) and len(r)>10000: continue
            d = type(r).__name__
            desc = list(r.keys())[:6] if isinstance(r, dict) else (getattr(r,"__qualname__",None) or str(type(r)))
            print("  "*depth, d, str(desc)[:150])
            if depth < 5: refs(r, depth+1, seen)
    new=[o for o in gc.get_objects() if isinstance(o, WanModel) and id(o) not in before]
    print(len(new))
    import comfy.model_management as mm
    print("loaded", mm.current_loaded_models)
    for o in new: refs(o)
