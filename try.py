import sys,time,torch,dataclasses
torch.set_num_threads(1)
from tests.measured_steps import *
from tests.benchmarks.contenders import FlopCounter
from lar_lightning.estimates.backbones import Backbone
from lar_lightning.estimates.memory import memory_of
from lar_lightning.estimates.speed import *
bb=Backbone(name="s",num_layers=6,hidden_size=256,feed_forward_size=768,num_heads=4,num_key_heads=2,head_size=64,vocabulary_size=8000)
b2=dataclasses.replace(bb,num_layers=4,hidden_size=384,feed_forward_size=1024,num_heads=6,num_key_heads=3,vocabulary_size=16000,is_tied=True)
for b_,tr,n,ck,c,bs,pl in [(bb,t,n,ck,64,1,0) for t in ("rows","lora","full") for n,ck in ((512,True),(1024,False))]+[(bb,t,1024,False,64,bs,256) for t in ("rows","lora") for bs in (1,2)]+[(b2,"full",700,False,8,1,0),(b2,"rows",1400,False,8,1,350)]:
  st=SmallStep(b_,trainable=tr,num_tokens=n,is_checkpointed=ck,rows_per_chunk=c,batch_size=bs,num_plain=pl)
  w=workload_of(st)
  with FlopCounter() as k: st.run()
  line=f"{b_.hidden_size} {tr} {n} {ck} {bs} plain {w.num_prompt_tokens} S {w.num_units} R {w.num_rows} flops {flops_of(b_,w)/k.total:.4f} {k.total/1e9:.1f}G"
  del st
  st=SmallStep(b_,trainable=tr,num_tokens=n,is_checkpointed=ck,rows_per_chunk=c,batch_size=bs,num_plain=pl)
  p=measured_bytes(st); m=memory_of(b_,w)
  print(line, "peak %.3f"%(m.peak/max(p.values())),{k:"%.1f/%.1f"%(m.moments[k]/1e6,v/1e6) for k,v in p.items()},flush=True)
