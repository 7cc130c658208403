"""Common English adjectives and nouns, each one word in lower case, to build made-up names from."""

from __future__ import annotations

_ADJECTIVES = """
able ancient angry bare bitter black blue bold brave brief bright broad broken brown busy
calm careful cheap clean clear clever cold common cool crazy curious dark deep different dry
early easy empty equal fair famous fancy fast final fine firm flat foreign free fresh full
gentle giant glad golden good grand gray great green half happy hard heavy hidden high hollow
honest huge human humble idle joint just kind large late lazy light little local lonely long
loud low lucky main major mild minor modern narrow native near neat new nice noble normal
odd old open orange outer pale patient perfect plain polite poor proud pure purple quick quiet
rapid rare raw ready real red rich rough round royal safe sharp short shy silent silver simple
slow small smart smooth soft solid sour steady steep still strange strong sweet tall
thick thin tiny tired tough usual warm weak wet white whole wide wild wise yellow young
"""

_NOUNS = """
actor animal apple arrow artist autumn baby bag ball band bank barn basket beach bear bell
bench bird boat bone book bottle bowl box branch bread bridge brush bucket bus butter button
camera camp candle car card castle cat chain chair cheese child church circle city clock
cloth cloud coat coffee coin corner country cow crowd crown cup desk doctor dog doll door
dream dress driver duck eagle ear egg engine eye face family farm farmer feather fence field
finger fire fish flag flower forest fork fox friend frog fruit game garden gate ghost gift
girl glass glove goat grass guitar hammer hand hat heart hill horse hotel house island jacket
judge king kitchen knife ladder lake lamp leaf lemon letter lion machine map market mirror
moon morning mountain mouse needle nest night nurse ocean office onion owl painter paper park
pencil piano picture pilot planet plate pocket poet pond queen rabbit radio rain ring river
road rock roof room rope sailor salt school sea shadow sheep ship shirt shoe shop singer snake
snow soldier song spoon star station stone storm story street summer table teacher tiger tower
town train tree valley village voice wagon wall water wheel window winter wolf writer yard
"""

ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())
NOUNS: tuple[str, ...] = tuple(_NOUNS.split())
